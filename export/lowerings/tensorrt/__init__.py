"""The network in TensorRT and TensorRT-RTX: `native` layers, or with this project's `plugins`; `library` is their one face.

`older_versions` composes layers that a version lacks; `weights_file` keeps constants out of private memory. Nothing
here imports a TensorRT until `library.load_library` is called.
"""
