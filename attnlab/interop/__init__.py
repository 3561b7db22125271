"""The authors' published PyTorch weights, in Flax NNX modules, and back.

`load(model, path_or_arrays)` and `export(model, path)` find what is official about a model by its class. Each file
`<slug>.py` describes the official classes of a mechanism (`official.Official`); the same description serves the golden
cases. `torch_files.read_state_dict` reads a checkpoint file into a dictionary of NumPy arrays, without PyTorch and
without running any code that the file holds.
"""

from attnlab.interop.weights import export, load

__all__ = ["export", "load"]
