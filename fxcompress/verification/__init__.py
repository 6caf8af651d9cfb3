"""Nothing is believed: the normal form is checked rule by rule, and what is computed is compared."""
