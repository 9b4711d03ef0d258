"""Number formats on disk: NVFP4 blocks and the compressed-tensors configuration that names them."""
