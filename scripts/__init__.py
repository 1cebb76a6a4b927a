# before any module here imports torch
import lora.waiting  # noqa: F401
