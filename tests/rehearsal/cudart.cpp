// A stand-in for libcudart.so.13 over host memory: torch's CUDA build runs over it where there is no GPU, with its
// own allocators, streams, events and checks for hidden synchronization.
//
// Source of the ABI: cuda_runtime_api.h of the pip package nvidia-cuda-runtime, against which this is compiled,
// so that a wrong signature does not build; the functions that only compilers call (__cuda...) are those of
// crt/host_runtime.h. What torch asks for and is not here answers cudaErrorNotSupported (build.py adds it).
//
// It does copies, fills, events and launches of the project's kernels, which come as functions for the CPU.
// Kernels of torch itself are refused by name: their code is for a GPU. host_ops.py does their work before.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>

#include "memory.h"
#include "streams.h"

#undef cudaGetDeviceProperties

namespace {

using standin::Block;
using standin::Event;
using standin::Kind;
using standin::Stream;

constexpr int MAX_DEVICES = 8;
constexpr size_t CAPACITY = size_t{4} << 30;  // of a device; a machine without a GPU has little memory
constexpr size_t SLOW_COPY = 1024;  // bytes; metadata columns and status words of a test's batch are smaller
// As an H200 has them (compute capability 9.0, CUDA C++ Programming Guide, technical specifications).
constexpr int SHARED_OPTIN = 232448, SHARED_DEFAULT = 49152, MULTIPROCESSORS = 132;

int setting(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int devices() {
    static const int n = std::min(MAX_DEVICES, setting("HBX_REHEARSAL_DEVICES", 2));
    return n;
}

// Copies and kernels begin late, so that whoever forgets to wait is seen.
void lag(const char* name) {
    if (int us = setting(name, 0)) std::this_thread::sleep_for(std::chrono::microseconds(us));
}

standin::Memory memory;
standin::Streams streams;
thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;
// An error of a kernel stays: every later wait reports it, as after a fault on a GPU.
std::atomic<cudaError_t> sticky{cudaSuccess};
std::atomic<unsigned> contexts{0};
// What tests count: see `standin_counts`.
struct Counts {
    std::atomic<long long> copies, pageable, event_waits, launches, refused;
} counts;

cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess) last = error;
    return error;
}

// Any call that needs a context makes one on the current device.
int touch() {
    contexts |= 1u << current;
    return current;
}

Stream* stream_of(cudaStream_t handle) { return streams.find(handle, touch()); }
Event* event_of(cudaEvent_t handle) { return reinterpret_cast<Event*>(handle); }

cudaError_t take(void** address, size_t nbytes, Kind kind) {
    *address = memory.take(nbytes, kind, touch(), CAPACITY);
    return result(*address ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t give(void* address) {
    if (!address) return cudaSuccess;
    streams.wait_for_all();  // as cudaFree and cudaFreeHost do
    return result(memory.give(address) ? cudaSuccess : cudaErrorInvalidValue);
}

bool on_device(const void* address, size_t nbytes) { return memory.find(address, nbytes).kind == Kind::DEVICE; }

cudaError_t copy(void* to, const void* from, size_t nbytes, cudaMemcpyKind kind, cudaStream_t handle) {
    ++counts.copies;
    if (!nbytes) return cudaSuccess;
    const bool reads_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    const bool writes_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    if ((reads_device && !on_device(from, nbytes)) || (writes_device && !on_device(to, nbytes))) {
        fprintf(stderr, "stand-in: a copy of %zu bytes leaves the block of device memory that it names\n", nbytes);
        return cudaErrorInvalidValue;
    }
    const bool pageable =
        memory.find(from).kind == Kind::PAGEABLE || memory.find(to).kind == Kind::PAGEABLE;
    Stream* stream = stream_of(handle);
    stream->order([=] {
        // Small copies are quick: late ones on the kernels' own stream would hide that another stream is late.
        if (nbytes >= SLOW_COPY) lag("HBX_REHEARSAL_COPY_US");
        memmove(to, from, nbytes);
    });
    // CUDA stages pageable memory: the call returns when the host's side of the copy is done.
    if (pageable) {
        ++counts.pageable;
        stream->wait();
    }
    return cudaSuccess;
}

// Names of torch's kernels by the address that launches name them by.
std::mutex names_mutex;
std::map<const void*, const char*> names;

cudaError_t refuse(const void* function) {
    ++counts.refused;
    std::lock_guard<std::mutex> guard(names_mutex);
    auto found = names.find(function);
    fprintf(stderr, "stand-in: a kernel of torch cannot run on the CPU: %s\n",
            found == names.end() ? "(unknown)" : found->second);
    return result(cudaErrorNotSupported);
}

}  // namespace

extern "C" {

// -- devices ---------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* n) {
    *n = devices();
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = current;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= devices()) return result(cudaErrorInvalidDevice);
    current = device;
    touch();  // since CUDA 12 this makes the context, even where it only sets back
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    *p = {};
    snprintf(p->name, sizeof p->name, "stand-in for an H200");
    p->uuid.bytes[0] = static_cast<char>(device + 1);
    p->totalGlobalMem = CAPACITY;
    p->major = 9;
    p->multiProcessorCount = MULTIPROCESSORS;
    p->warpSize = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = SHARED_DEFAULT;
    p->sharedMemPerBlockOptin = SHARED_OPTIN;
    p->sharedMemPerMultiprocessor = SHARED_OPTIN + 1024;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->l2CacheSize = 60 << 20;
    p->unifiedAddressing = p->canMapHostMemory = 1;
    p->pciBusID = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_OPTIN; break;
        case cudaDevAttrMultiProcessorCount: *value = MULTIPROCESSORS; break;
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
        default: *value = 0;
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
    snprintf(text, size, "0000:%02x:00.0", device);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    touch();
    streams.wait_for_all();
    return result(sticky);
}

// -- errors ----------------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last; }

const char* cudaGetErrorString(cudaError_t error) {
    thread_local char text[64];
    snprintf(text, sizeof text, "error %d of the stand-in runtime", static_cast<int>(error));
    return text;
}

const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

// -- memory ----------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** address, size_t nbytes) { return take(address, nbytes, Kind::DEVICE); }
cudaError_t cudaFree(void* address) { return give(address); }
cudaError_t cudaHostAlloc(void** address, size_t nbytes, unsigned) {
    return take(address, nbytes, Kind::PAGE_LOCKED);
}
cudaError_t cudaFreeHost(void* address) { return give(address); }

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *total = CAPACITY;
    *free = CAPACITY - memory.used(touch());
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* address) {
    const Block block = memory.find(address);
    *found = {};
    found->device = block.device;
    found->type = block.kind == Kind::DEVICE        ? cudaMemoryTypeDevice
                  : block.kind == Kind::PAGE_LOCKED ? cudaMemoryTypeHost
                                                    : cudaMemoryTypeUnregistered;
    if (block.kind != Kind::PAGEABLE) found->devicePointer = const_cast<void*>(address);
    if (block.kind != Kind::DEVICE) found->hostPointer = const_cast<void*>(address);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t nbytes, cudaMemcpyKind kind, cudaStream_t stream) {
    return result(copy(to, from, nbytes, kind, stream));
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t nbytes, cudaMemcpyKind kind) {
    const cudaError_t error = copy(to, from, nbytes, kind, nullptr);
    stream_of(nullptr)->wait();
    return result(error);
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t nbytes, cudaStream_t stream) {
    if (nbytes && !on_device(to, nbytes)) return result(cudaErrorInvalidValue);
    stream_of(stream)->order([=] { memset(to, value, nbytes); });
    return cudaSuccess;
}

cudaError_t cudaMemset(void* to, int value, size_t nbytes) { return cudaMemsetAsync(to, value, nbytes, nullptr); }

// -- streams and events ----------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
    *stream = reinterpret_cast<cudaStream_t>(streams.make(touch(), priority));
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    stream_of(stream)->wait();
    return result(sticky);
}

// Not ready is an answer, not an error: it does not become the last error.
cudaError_t cudaStreamQuery(cudaStream_t stream) { return stream_of(stream)->idle() ? cudaSuccess : cudaErrorNotReady; }

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
    *priority = stream_of(stream)->priority;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t*,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
    *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    stream_of(stream)->order([=] { function(data); });
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = reinterpret_cast<cudaEvent_t>(new Event(touch()));
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event_of(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
    Stream* stream = stream_of(handle);
    if (stream->device != event_of(event)->device) return result(cudaErrorInvalidResourceHandle);
    event_of(event)->record(stream);
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return cudaEventRecord(event, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t event) { return event_of(event)->passed() ? cudaSuccess : cudaErrorNotReady; }

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    ++counts.event_waits;
    event_of(event)->wait();
    return result(sticky);
}

// Nothing here takes the time that it would take on a GPU, so no time is reported.
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
    *ms = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    event_of(event)->hold_up(stream_of(stream));
    return cudaSuccess;
}

// -- the driver, as far as torch asks for it through the runtime -------------------------------------------

static int not_there() { return cudaErrorNotSupported; }

// torch sets a device back at the end of a guard only where it has a context, and finds that out here.
static int primary_context_state(int device, unsigned* flags, int* active) {
    if (flags) *flags = 0;
    if (active) *active = (contexts >> device) & 1;
    return 0;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
    const bool known = !strcmp(name, "cuDevicePrimaryCtxGetState");
    *function = known ? reinterpret_cast<void*>(primary_context_state) : reinterpret_cast<void*>(not_there);
    if (found) *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// -- kernels of torch: registered, never run ---------------------------------------------------------------

void** __cudaRegisterFatBinary(void*) {
    static void* handle[1];
    return handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
    std::lock_guard<std::mutex> guard(names_mutex);
    names[host] = name;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
    return cudaSuccess;
}

// `kernel<<<grid, block, shared, stream>>>(...)` pushes its configuration and calls a function that pops it.
struct Configuration {
    dim3 grid, block;
    size_t shared;
    void* stream;
};
static thread_local Configuration configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *static_cast<void**>(stream) = configuration.stream;
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) { return refuse(kernel); }
cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t) { return refuse(function); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* function, void**) { return refuse(function); }

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
    *found = {};
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    found->binaryVersion = found->ptxVersion = 90;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
    *n = 2;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
    *n = 2;
    return cudaSuccess;
}

// -- for the tests -----------------------------------------------------------------------------------------

// Order a kernel of the project on a stream of the current device.
//
// entry      function of the emulation (EMUL_EXPORT of tests/emulation/shim.h); returns 0 where all went well
// launch     bytes of its argument hbx_emul::Launch, which the caller keeps for the report it points to
// arguments  values of the kernel's arguments one after another, `sizes[i]` bytes each
//
// Returns 0, or cudaErrorInvalidResourceHandle where the stream belongs to another device.
int standin_launch(void* handle, int (*entry)(void*, void**), const unsigned char* launch, unsigned launch_bytes,
                   const unsigned char* arguments, const unsigned* sizes, int n, const char* report) {
    Stream* stream = stream_of(static_cast<cudaStream_t>(handle));
    if (stream->device != current) return cudaErrorInvalidResourceHandle;
    ++counts.launches;
    std::vector<unsigned char> description(launch, launch + launch_bytes);
    std::vector<std::vector<unsigned char>> values;
    for (int i = 0; i < n; ++i) {
        values.emplace_back(arguments, arguments + sizes[i]);
        arguments += sizes[i];
    }
    stream->order([=]() mutable {
        lag("HBX_REHEARSAL_KERNEL_US");
        // The emulation's fibers belong to the library: one launch at a time.
        static std::mutex one_at_a_time;
        std::lock_guard<std::mutex> guard(one_at_a_time);
        std::vector<void*> pointers;
        for (auto& value : values) pointers.push_back(value.data());
        pointers.push_back(nullptr);
        if (entry(description.data(), pointers.data())) {
            fprintf(stderr, "stand-in: a kernel failed: %s\n", report);
            sticky = cudaErrorLaunchFailure;
        }
    });
    return 0;
}

// Bit d is set where device d has a context.
unsigned standin_contexts() { return contexts; }

// Copies, copies of pageable memory, waits for events, launches of the project's kernels, refused launches.
void standin_counts(long long* five) {
    const std::atomic<long long>* all[] = {&counts.copies, &counts.pageable, &counts.event_waits, &counts.launches,
                                           &counts.refused};
    for (int i = 0; i < 5; ++i) five[i] = *all[i];
}

}  // extern "C"
