"""What `tensorrt_engine` is made of: CUDA's driver, the builder, built engines, one session."""
