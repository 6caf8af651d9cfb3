"""A grammar of networks: every structure that channel removal supports, put together at random."""

import torch
from grammar_images import SIDE, SIMPLE, STRUCTURES, chain, conv, pick, width
from grammar_tokens import BODIES, LAYERS
from hypothesis import strategies as st
from models import inputs
from pruning import Wire, weight
from torch import nn
from torch.nn import functional as F

CLASSES = 3
OVER_IMAGES = (*SIMPLE, *STRUCTURES)
OVER_TOKENS = (*LAYERS, *BODIES)
PRODUCTIONS = {
    **{f"images-{production.__name__}": production for production in OVER_IMAGES},
    **{f"tokens-{production.__name__}": production for production in OVER_TOKENS},
}


@st.composite
def networks(draw, production):
    """A network in which a production takes part, and its input."""
    if production in OVER_IMAGES:
        return convolutional(draw, production)
    return pick(draw, vision_transformer, language_model)(draw, production)


def around(draw, production, others):
    """Which productions stand before and after one, at most three."""
    before = [pick(draw, *others) for _ in range(draw(st.integers(0, 1)))]
    return [*before, production, *(pick(draw, *others) for _ in range(draw(st.integers(0, 2))))]


def convolutional(draw, production):
    channels = width(draw)
    layers = [conv(3, channels, pick(draw, 1, 3))]
    for each in around(draw, production, OVER_IMAGES):
        layer, channels = each(draw, channels)
        layers.append(layer)
    return ended(draw, nn.Sequential(*layers), channels), inputs(2, 3, SIDE, SIDE)


def ended(draw, body, channels):
    way = pick(draw, "pool", "flatten", "convolution", "two outputs")
    if way == "convolution":
        return nn.Sequential(body, conv(channels, CLASSES))
    if way == "flatten":
        return nn.Sequential(body, nn.Flatten(), nn.Linear(channels * SIDE * SIDE, CLASSES))
    if way == "pool":
        return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))
    more, out = chain(draw, channels)

    def forked(m, x):
        x = m.body(x)
        return m.first(x.mean((2, 3))), m.second(m.more(x))

    return Wire(forked, body=body, more=more, first=nn.Linear(channels, CLASSES), second=conv(out, CLASSES))


def over_tokens(draw, production, count, channels):
    layers = []
    for each in around(draw, production, OVER_TOKENS):
        layer, channels = each(draw, count, channels)
        layers.append(layer)
    return nn.Sequential(*layers), channels


def vision_transformer(draw, production):
    channels, with_class = width(draw), draw(st.booleans())
    count = SIDE**2 // 4 + with_class
    body, out = over_tokens(draw, production, count, channels)

    def forward(m, x):
        x = m.patches(x).flatten(2).transpose(1, 2)
        if with_class:
            x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1)
        x = m.body(x + m.position)
        return m.head(x[:, 0] if with_class else x.mean(1))

    model = Wire(
        forward, patches=nn.Conv2d(3, channels, 2, 2), position=weight(1, count, channels), body=body,
        head=nn.Linear(out, CLASSES), **({"token": weight(1, 1, channels)} if with_class else {}),
    )  # fmt: skip
    return model, inputs(2, 3, SIDE, SIDE)


def language_model(draw, production):
    length, channels, tied = 4, width(draw), draw(st.booleans())
    body, out = over_tokens(draw, production, length, channels)

    def forward(m, x):
        x = m.back(m.body(m.words(x) + m.places.weight))
        return F.linear(x, m.words.weight) if tied else m.head(x)[:, -1]

    layers = {"words": nn.Embedding(9, channels), "places": nn.Embedding(length, channels)}
    head = {} if tied else {"head": nn.Linear(channels, 9)}
    return Wire(forward, **layers, body=body, back=nn.Linear(out, channels), **head), torch.tensor(
        [[0, 3, 1, 8], [2, 2, 7, 5]]
    )
