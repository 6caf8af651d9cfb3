"""The zoo: every model that coverage is claimed for, built with random but settled weights.

``names()`` lists them as ``source:model``; ``build(name)`` gives the model and example inputs of two rows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

CACHE = Path(__file__).parent / "results" / "timm_smallest.json"

ON_META = {"regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32"}
"""The four largest of torchvision."""

_VIDEO = ("mvit", "swin3d", "r3d", "mc3", "r2plus1d", "s3d")
_SMALL_IMAGE = 96
_FIXED_IMAGE = 112
_UNFIT = (RuntimeError, AssertionError, ValueError, IndexError)


@dataclass(frozen=True)
class Subject:
    """One model of the zoo with its example inputs.

    Attributes:
        model: The model, in eval mode, settled.
        args: Positional example inputs, two rows.
        kwargs: Keyword example inputs, two rows.
        islands: Whether it is captured in islands (data-dependent control flow).
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    islands: bool = False


def names() -> list[str]:
    """All models, ``source:model``."""
    return [*torchvision_names(), *timm_names(), *(f"hf:{name}" for name in HUGGING_FACE)]


def build(name: str) -> Subject:
    """Builds one model of the zoo."""
    source, _, model = name.partition(":")
    torch.manual_seed(0)
    return {"torchvision": _torchvision, "timm": _timm, "hf": _hugging_face}[source](model)


def settle(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Gives batch norms statistics that mean something, norms weights that are neither 1 nor 0, and no layer all zeros.

    Some models start with a head of zeros: whatever is wrong before it, all outputs and gradients are 0.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.is_meta and not bool(parameter.any()):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if "Norm" in type(module).__name__:
                for parameter in module.parameters(recurse=False):
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for module in batch_norms:
            module.train()
        if batch_norms:
            for _ in range(2):
                model(*args, **kwargs)
    model.eval()


def torchvision_names() -> list[str]:
    import torchvision

    return [f"torchvision:{name}" for name in torchvision.models.list_models() if not name.startswith("quantized_")]


def _torchvision(name: str) -> Subject:
    import torchvision

    if name in ON_META:
        model = torchvision.models.get_model(name).eval().to("meta")
        return Subject(model, (torch.randn(2, 3, 224, 224, device="meta"),), {})
    builder = torchvision.models.get_model_builder(name)
    if ".detection." in builder.__module__:
        sizes = {} if name.startswith("ssd") else {"min_size": 160, "max_size": 256}  # 800 pixels take minutes
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None, **sizes).eval()
        images = [torch.rand(3, 160, 192), torch.rand(3, 160, 192)]
        return Subject(model, (images,), {}, islands=True)
    if ".segmentation." in builder.__module__:
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
        return _settled(model, (torch.randn(2, 3, 96, 96),))
    if ".optical_flow." in builder.__module__:
        images = (torch.rand(2, 3, 128, 128) * 2 - 1, torch.rand(2, 3, 128, 128) * 2 - 1)
        return _settled(torchvision.models.get_model(name, weights=None), images, {"num_flow_updates": 2})
    model = torchvision.models.get_model(name, weights=None)
    if name.startswith(_VIDEO):
        fixed = name.startswith(("mvit", "s3d"))
        return _settled(model, (torch.randn(2, 3, 16, 224, 224) if fixed else torch.randn(2, 3, 16, 64, 64),))
    return _image_model(model, (_SMALL_IMAGE, 128, 299 if name.startswith("inception") else 224))


def timm_names() -> list[str]:
    """The smallest model of each family (module) of timm, by parameters."""
    if not CACHE.exists():
        CACHE.parent.mkdir(exist_ok=True)
        CACHE.write_text(json.dumps(_smallest(), indent=1))
    return [f"timm:{name}" for name in sorted(json.loads(CACHE.read_text()).values())]


def _smallest() -> dict[str, str]:
    import timm

    smallest: dict[str, tuple[int, str]] = {}
    for family in timm.list_modules():
        for name in timm.list_models(module=family, exclude_filters="test_*") or timm.list_models(module=family):
            size = _timm_size(name)
            if size is not None and (family not in smallest or size < smallest[family][0]):
                smallest[family] = (size, name)
    return {family: name for family, (_, name) in smallest.items()}


def _timm_size(name: str) -> int | None:
    import timm

    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in timm.create_model(name).parameters())
    except (RuntimeError, NotImplementedError, TypeError, ValueError, ImportError):
        return None


def _timm(name: str) -> Subject:
    import timm

    model = timm.create_model(name)
    config = getattr(model, "pretrained_cfg", {})
    channels, height, _ = config.get("input_size", (3, 224, 224))
    try:
        return _image_model(model, (_SMALL_IMAGE, 128), channels)
    except _UNFIT:  # a fixed size: built for a smaller one where the constructor takes it
        try:
            return _image_model(timm.create_model(name, img_size=_FIXED_IMAGE), (_FIXED_IMAGE,), channels)
        except (*_UNFIT, TypeError):
            return _image_model(model, (height,), channels)


def _image_model(model: nn.Module, sides: tuple[int, ...], channels: int = 3) -> Subject:
    """The model with images of the first size that it accepts."""
    model.eval()
    for side in sides:
        image = torch.randn(2, channels, side, side)
        try:
            with torch.no_grad():
                model(image)
        except _UNFIT:
            if side == sides[-1]:
                raise
            continue
        return _settled(model, (image,))
    raise ValueError("no image size given")


def _settled(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Subject:
    settle(model, args, kwargs or {})
    return Subject(model, args, kwargs or {})


def _hugging_face(name: str) -> Subject:
    model, inputs = HUGGING_FACE[name]()
    settle(model, (), inputs)
    return Subject(model, (), inputs)


def _text(vocabulary: int = 512, length: int = 16) -> dict[str, Any]:
    ids = torch.randint(3, vocabulary, (2, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _encoder(config: str, model: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    settings = {"vocab_size": 512, **options}
    return getattr(transformers, model)(getattr(transformers, config)(**settings)), _text()


def _decoder(config: str, model: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return _encoder(config, model, **{**sizes, **options})


def _vision(config: str, model: str, image: int = 64, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    made = getattr(transformers, model)(getattr(transformers, config)(**options))
    return made, {"pixel_values": torch.randn(2, 3, image, image)}


def _seq2seq(config: str, model: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    made, inputs = _encoder(config, model, use_cache=False, **options)
    return made, {**inputs, "decoder_input_ids": torch.randint(3, 512, (2, 8))}


def _whisper() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=512, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=50, use_cache=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperModel(config), {
        "input_features": torch.randn(2, 80, 100), "decoder_input_ids": torch.randint(3, 512, (2, 8)),
    }  # fmt: skip


def _clip() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 512, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
        vision_config={**sizes, "image_size": 64, "patch_size": 16},
        projection_dim=32,
    )
    return CLIPModel(config), {**_text(), "pixel_values": torch.randn(2, 3, 64, 64)}


def _sam() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    config = SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=64, output_channels=32, num_hidden_layers=2, num_attention_heads=4, image_size=64,
            patch_size=16, mlp_dim=128, window_size=2, global_attn_indexes=[1], num_pos_feats=16,
        ).to_dict(),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=32, image_size=64, patch_size=16, mask_input_channels=8
        ).to_dict(),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=32, mlp_dim=64, num_hidden_layers=2, num_attention_heads=4, iou_head_hidden_dim=32
        ).to_dict(),
    )  # fmt: skip
    return SamModel(config), {"pixel_values": torch.randn(2, 3, 64, 64), "input_points": torch.rand(2, 1, 2, 2) * 64}


_SMALL_BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_SMALL_VIT = {**_SMALL_BERT, "image_size": 64, "patch_size": 16}

HUGGING_FACE: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "bert": functools.partial(_encoder, "BertConfig", "BertForSequenceClassification", **_SMALL_BERT),
    "roberta": functools.partial(_encoder, "RobertaConfig", "RobertaForMaskedLM", **_SMALL_BERT),
    "electra": functools.partial(_encoder, "ElectraConfig", "ElectraModel", **_SMALL_BERT, embedding_size=32),
    "distilbert": functools.partial(
        _encoder, "DistilBertConfig", "DistilBertForMaskedLM", dim=64, hidden_dim=128, n_layers=2, n_heads=4
    ),
    "gpt2": functools.partial(
        _encoder, "GPT2Config", "GPT2LMHeadModel", n_embd=64, n_layer=2, n_head=4, use_cache=False, bos_token_id=1,
        eos_token_id=2,
    ),
    "llama": functools.partial(_decoder, "LlamaConfig", "LlamaForCausalLM"),
    "mistral": functools.partial(_decoder, "MistralConfig", "MistralForCausalLM", sliding_window=8),
    "mixtral": functools.partial(_decoder, "MixtralConfig", "MixtralForCausalLM", num_local_experts=4),
    "qwen2": functools.partial(_decoder, "Qwen2Config", "Qwen2ForCausalLM"),
    "gemma": functools.partial(_decoder, "GemmaConfig", "GemmaForCausalLM", head_dim=8),
    "t5": functools.partial(
        _seq2seq, "T5Config", "T5ForConditionalGeneration", d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4
    ),
    "bart": functools.partial(
        _seq2seq, "BartConfig", "BartModel", d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128,
    ),
    "whisper": _whisper,
    "clip": _clip,
    "vit": functools.partial(_vision, "ViTConfig", "ViTForImageClassification", **_SMALL_VIT),
    "deit": functools.partial(_vision, "DeiTConfig", "DeiTModel", **_SMALL_VIT),
    "swin": functools.partial(
        _vision, "SwinConfig", "SwinForImageClassification", image_size=64, patch_size=4, embed_dim=24, depths=[1, 2],
        num_heads=[2, 4], window_size=4,
    ),
    "convnext": functools.partial(
        _vision, "ConvNextConfig", "ConvNextForImageClassification", depths=[1, 1, 2, 1], hidden_sizes=[16, 32, 48, 64]
    ),
    "segformer": functools.partial(
        _vision, "SegformerConfig", "SegformerForSemanticSegmentation", hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=32,
    ),
    "sam": _sam,
}  # fmt: skip
