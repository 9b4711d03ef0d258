"""Number formats, a module each, and the compressed-tensors configuration that names them."""
