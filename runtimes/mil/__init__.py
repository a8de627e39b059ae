"""An interpreter of Core ML's MIL programs: reads saved packages, runs them in torch.

`program` and `weights` read; `registry` lists the operations, which stand in files by theme;
`execute` runs. Only the files of operations and `execute` import torch, and are imported inside
functions.
"""
