// From a filled-in call to a running kernel: device table, guard, stream, workspace.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <stdexcept>

#include "view.h"

namespace fusegrad {

// The capability that CPU kernels run with: the best that this CPU and this build have, or FUSEGRAD_CPU_CAPABILITY.
Variant cpu_variant();
const char* variant_name(Variant variant);

// Whether CPU tensors get the CUDA kernels, run by tests/emulator.
#ifdef FUSEGRAD_EMULATED
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

// While it lives, torch's operators are neither recorded nor cast.
struct Quiet {
  at::AutoDispatchBelowADInplaceOrView unrecorded;
  c10::impl::ExcludeDispatchKeyGuard uncast{c10::autocast_dispatch_keyset};
};

template <class Args>
const Kernel<Args>& kernel_for(const char* op, const at::Device& device) {
#ifdef FUSEGRAD_EMULATED
  if (device.is_cpu()) return Kernels<Args, kCuda>::entry;
#elif defined(FUSEGRAD_VARIANT)  // an extension, compiled for one CPU
  if (device.is_cpu()) return Kernels<Args, FUSEGRAD_VARIANT>::entry;
#else
  if (device.is_cpu()) {
    switch (cpu_variant()) {
#ifdef FUSEGRAD_HAS_AVX512
      case kAvx512: return Kernels<Args, kAvx512>::entry;
#endif
#ifdef FUSEGRAD_HAS_AVX2
      case kAvx2: return Kernels<Args, kAvx2>::entry;
#endif
      default: return Kernels<Args, kDefault>::entry;
    }
  }
#endif
#ifdef FUSEGRAD_HAS_CUDA
  if (device.is_cuda()) return Kernels<Args, kCuda>::entry;
#endif
  TORCH_CHECK(false, op, ": input must be on a device that this build has kernels for, got a tensor on ", device,
              "; reinstall fusegrad where nvcc and a CUDA build of torch are found, or move the tensor to the CPU");
}

template <class Args>
void launch(const Frame& frame, const Kernel<Args>& kernel, const Args& args) {
  const at::Device device = frame.main().device();
  void* stream = device.is_cpu() ? nullptr : c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
  try {
    kernel.launch(args, stream);
  } catch (const std::runtime_error& error) {
    TORCH_CHECK(false, frame.op(), ": the kernel failed on ", device, " (input ", frame.main().sizes(), "): ", error.what());
  }
}

template <class Op>
void run(Frame& frame, RowArgs<Op>& args) {
  frame.finish(args.extent);
  args.rows = frame.type(), args.params = frame.param_type();
  const c10::OptionalDeviceGuard guard(frame.main().device());
  const auto& kernel = kernel_for<RowArgs<Op>>(frame.op(), frame.main().device());
  if (args.extent.rows == 0 && !args.sums_columns()) return;
  Tensor workspace;
  if (args.sums_columns()) {
    args.slices = kernel.slices(args);
    workspace = at::empty({Op::col_out * args.slices * args.sets * frame.cols()}, frame.main().options().dtype(frame.wide()));
    args.partial = workspace.mutable_data_ptr();
  }
  launch(frame, kernel, args);
}

// The sums of a map op over all elements, in slices: [sums, slices] of the accumulate type.
template <class Op>
Tensor run_sums(Frame& frame, MapArgs<Op>& args) {
  frame.finish(args.extent);
  args.rows = frame.type();
  const c10::OptionalDeviceGuard guard(frame.main().device());
  const auto& kernel = kernel_for<MapArgs<Op>>(frame.op(), frame.main().device());
  args.slices = args.extent.rows * args.extent.cols == 0 ? 0 : kernel.slices(args);
  Tensor partial = at::empty({Op::sums, args.slices}, frame.main().options().dtype(frame.wide()));
  args.partial = partial.mutable_data_ptr();
  if (args.slices > 0) launch(frame, kernel, args);
  return partial;
}

template <class Op>
void run(Frame& frame, MapArgs<Op>& args) {
  frame.finish(args.extent);
  args.rows = frame.type();
  if (args.extent.rows * args.extent.cols == 0) return;
  const c10::OptionalDeviceGuard guard(frame.main().device());
  launch(frame, kernel_for<MapArgs<Op>>(frame.op(), frame.main().device()), args);
}

}  // namespace fusegrad
