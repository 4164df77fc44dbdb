"""TwigVLM++'s two further stages (arXiv 2503.14075v3): distillation of twig and pruning head, then policy gradients for the head."""
