import os


def path(t, op):
    return "triton" if os.environ.get("THRIFTLAB_KERNELS") == "triton" or t.is_cuda else "torch"
