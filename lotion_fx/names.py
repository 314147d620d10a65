"""Names of parameters and modules."""


def plain_name(name: str) -> str:
    """A name as the model has it without `torch.compile` around a part."""
    return name.replace("_orig_mod.", "")
