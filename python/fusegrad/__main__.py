"""`python -m fusegrad info`: what was built, what is in use, and what each op runs on."""

import argparse

import torch

import fusegrad
from fusegrad import _C, _build_info
from fusegrad._op import KERNEL_DEVICES, OPS


def info() -> None:
    print(f"fusegrad        {fusegrad.__version__}")
    print(f"torch           {torch.__version__} (built for {_build_info.TORCH})")
    print(f"CPU capability  {_C.cpu_capability()} (built: {', '.join(_build_info.VARIANTS)}; FUSEGRAD_CPU_CAPABILITY chooses)")
    print(f"threads         {torch.get_num_threads()}")
    print(f"CUDA kernels    {f'built for CUDA {_build_info.CUDA}' if _C.with_cuda else 'not built'}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"CUDA devices    {', '.join(devices) or 'none'}")
    width = max(map(len, OPS))
    print(f"\n{'op':{width}}  kernels    by the reference, beside other devices and complex dtypes that torch's operators take")
    for name, op in sorted(OPS.items()):
        print(f"{name:{width}}  {', '.join(KERNEL_DEVICES):10} {op.by_reference}".rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fusegrad", description="fused training layers for PyTorch")
    parser.add_argument("command", choices=["info"], help="info: versions, CPU capability, devices, and what each op runs on")
    parser.parse_args()
    info()


if __name__ == "__main__":
    main()
