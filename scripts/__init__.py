# before any module here imports torch
import lora.fast.waiting  # noqa: F401
