"""A page on which to look at a model: `python -m twigvlm.web`. Needs the extra [web]; nothing here decodes, the engine does."""
