// One CUDA device that does nothing, so that autograd runs on fake tensors of a torch without CUDA.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;

struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Stream getStream(Device) const noexcept override {
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0));
  }
};

struct Hooks final : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
  // none: a torch with CUDA asks for it before it picks a kernel of attention
  long versionRuntimeCuDNN() const override { return 0; }
};

extern "C" void install() {
  impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(new Guard);
  // torch makes its hooks once and keeps them: exchange their table of virtual functions
  auto& there = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  *reinterpret_cast<void**>(&there) = *reinterpret_cast<void**>(new Hooks);
}
