"""The recognition families, one file per family."""

if __name__ == "guides":
    raise ImportError("import pyro_contrastive.guides, not the bare folder guides")
