"""The authors' published PyTorch weights, in Flax NNX modules.

`attnlab.interop.torch_files.read_state_dict` reads a checkpoint file into a dictionary of NumPy arrays, without PyTorch
and without running any code that the file holds. `attnlab.interop.official` puts such a dictionary into a module.
"""
