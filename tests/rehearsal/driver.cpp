// A stand-in for libcuda.so.1: the little that torch asks the driver itself for. build.py adds functions that say
// that they are not there. Signatures are those of cuda.h of the pip package nvidia-cuda-runtime.
#include <cuda.h>

extern "C" {

unsigned standin_contexts();  // of cudart.cpp, which is loaded before

// torch sets a device back at the end of a guard only where it has a context, and finds that out here.
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    *flags = 0;
    *active = static_cast<int>(standin_contexts() >> device & 1);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = nullptr;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, const char** text) {
    *text = "an error of the stand-in driver";
    return CUDA_SUCCESS;
}

}  // extern "C"
