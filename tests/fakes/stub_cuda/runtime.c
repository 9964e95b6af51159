/* CUDA's runtime library without a GPU: a libcudart.so.13 for tests, on top of the driver in driver.c.

   It has what ONNX Runtime's CUDA provider calls.  The provider's own code runs as on a GPU: which kernels it chooses,
   what it copies, allocates and waits for, in which order, and what of it happens during a capture, where the driver
   is as strict as NVIDIA's.  Kernels do nothing, so the numbers are none; memory starts as zeros to keep them finite. */

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <string.h>

/* Errors have the same numbers in both libraries. */
static __thread cudaError_t last;
static cudaError_t told(CUresult result) { return result ? (last = (cudaError_t)result) : cudaSuccess; }
#define TRY(call) do { CUresult tried = (call); if (tried) return told(tried); } while (0)

/* A piece of work for the driver; see driver.c. */
CUresult stub_enqueue(CUstream stream, CUresult (*call)(int number), int number);

/* Every thread works in the device's primary context, whether it chose it or not. */
static CUresult enter(void)
{
    static __thread int entered;
    CUcontext context = NULL;
    if (entered && !cuCtxGetCurrent(&context) && context)
        return CUDA_SUCCESS;
    CUresult result = cuInit(0);
    if (!result && !cuCtxGetCurrent(&context) && !context && !(result = cuDevicePrimaryCtxRetain(&context, 0)))
        result = cuCtxSetCurrent(context);
    entered = !result;
    return result;
}
#define IN(call) do { TRY(enter()); return told(call); } while (0)

/* ---- kernels --------------------------------------------------------------------------------------------------- */

void **__cudaRegisterFatBinary(void *binary) { static void *handle[4]; (void)binary; return handle; }
void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
void __cudaUnregisterFatBinary(void **handle) { (void)handle; }
void __cudaRegisterFunction(void **handle) { (void)handle; }
void __cudaRegisterVar(void **handle) { (void)handle; }

static __thread struct { dim3 grid, block; size_t shared; cudaStream_t stream; } configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream)
{
    configuration.grid = grid, configuration.block = block;
    configuration.shared = shared, configuration.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream)
{
    *grid = configuration.grid, *block = configuration.block;
    *shared = configuration.shared, *(cudaStream_t *)stream = configuration.stream;
    return cudaSuccess;
}
static CUresult nothing(int number) { (void)number; return CUDA_SUCCESS; }
cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream)
{
    (void)function, (void)arguments;
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || !block.x || !block.y || !block.z ||
        (size_t)block.x * block.y * block.z > 1024 || shared > 232448)
        return told(CUDA_ERROR_INVALID_VALUE);
    IN(stub_enqueue(stream, nothing, 0));
}
cudaError_t __cudaLaunchKernel(cudaKernel_t function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream)
{
    return cudaLaunchKernel(function, grid, block, arguments, shared, stream);
}
cudaError_t __cudaGetKernel(cudaKernel_t *found, const void *function) { *found = (cudaKernel_t)function; return cudaSuccess; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *function, void **arguments)
{
    return cudaLaunchKernel(function, c->gridDim, c->blockDim, arguments, c->dynamicSmemBytes, c->stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream)
{
    return cudaLaunchKernel(function, grid, block, arguments, shared, stream);
}

#define HOST_FUNCTIONS 4096
static struct { cudaHostFn_t call; void *data; } host_functions[HOST_FUNCTIONS];
static CUresult call_host(int number) { host_functions[number].call(host_functions[number].data); return CUDA_SUCCESS; }
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *data)
{
    static int count;
    int number = __atomic_fetch_add(&count, 1, __ATOMIC_RELAXED) % HOST_FUNCTIONS;
    host_functions[number].call = call, host_functions[number].data = data;
    IN(stub_enqueue(stream, call_host, number));
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function)
{
    (void)function;
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024, found->numRegs = 64, found->ptxVersion = found->binaryVersion = 90;
    found->maxDynamicSharedSizeBytes = 49152;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value)
{
    (void)function, (void)attribute;
    return value <= 232448 ? cudaSuccess : told(CUDA_ERROR_INVALID_VALUE);
}
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t function, enum cudaFuncAttribute attribute, int value, int device)
{
    (void)device;
    return cudaFuncSetAttribute(function, attribute, value);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *function, int threads, size_t shared, unsigned flags)
{
    (void)function, (void)threads, (void)shared, (void)flags;
    *count = 2;
    return cudaSuccess;
}
cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *code, enum cudaJitOption *options, void **values, unsigned count, enum cudaLibraryOption *names, void **more, unsigned more_count)
{
    (void)code, (void)options, (void)values, (void)count, (void)names, (void)more, (void)more_count;
    *library = (cudaLibrary_t)nothing;
    return cudaSuccess;
}
cudaError_t cudaLibraryUnload(cudaLibrary_t library) { (void)library; return cudaSuccess; }
cudaError_t cudaLibraryGetKernel(cudaKernel_t *found, cudaLibrary_t library, const char *name)
{
    (void)library, (void)name;
    *found = (cudaKernel_t)nothing;
    return cudaSuccess;
}
CUresult tensor_map(void) __asm__("cuTensorMapEncodeTiled"); /* the driver's, that attention kernels describe memory by */
CUresult tensor_map(void) { return CUDA_SUCCESS; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *result)
{
    CUdriverProcAddressQueryResult status;
    CUresult code = cuGetProcAddress(name, found, (int)version, flags, &status);
    if (result) *result = code ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* ---- the device ------------------------------------------------------------------------------------------------ */

cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { TRY(enter()); return device ? told(CUDA_ERROR_INVALID_DEVICE) : cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *count) { IN(cuDeviceGetCount(count)); }
cudaError_t cudaDriverGetVersion(int *version) { return told(cuDriverGetVersion(version)); }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device)
{
    IN(cuDeviceGetAttribute(value, (CUdevice_attribute)attribute, device));
}
cudaError_t cudaDeviceSynchronize(void) { IN(cuCtxSynchronize()); }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device)
{
    TRY(enter());
    memset(found, 0, sizeof *found);
    TRY(cuDeviceGetName(found->name, sizeof found->name, device));
    TRY(cuDeviceTotalMem(&found->totalGlobalMem, device));
    int value;
#define ASK(field, attribute) TRY(cuDeviceGetAttribute(&value, CU_DEVICE_ATTRIBUTE_##attribute, device)); found->field = value
    ASK(major, COMPUTE_CAPABILITY_MAJOR);
    ASK(minor, COMPUTE_CAPABILITY_MINOR);
    ASK(multiProcessorCount, MULTIPROCESSOR_COUNT);
    ASK(maxThreadsPerMultiProcessor, MAX_THREADS_PER_MULTIPROCESSOR);
    ASK(maxThreadsPerBlock, MAX_THREADS_PER_BLOCK);
    ASK(maxThreadsDim[0], MAX_BLOCK_DIM_X);
    ASK(maxThreadsDim[1], MAX_BLOCK_DIM_Y);
    ASK(maxThreadsDim[2], MAX_BLOCK_DIM_Z);
    ASK(maxGridSize[0], MAX_GRID_DIM_X);
    ASK(maxGridSize[1], MAX_GRID_DIM_Y);
    ASK(maxGridSize[2], MAX_GRID_DIM_Z);
    ASK(sharedMemPerBlock, MAX_SHARED_MEMORY_PER_BLOCK);
    ASK(sharedMemPerBlockOptin, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
    ASK(sharedMemPerMultiprocessor, MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
    ASK(regsPerBlock, MAX_REGISTERS_PER_BLOCK);
    ASK(regsPerMultiprocessor, MAX_REGISTERS_PER_MULTIPROCESSOR);
    ASK(warpSize, WARP_SIZE);
    ASK(l2CacheSize, L2_CACHE_SIZE);
#undef ASK
    return cudaSuccess;
}
cudaError_t cudaGetLastError(void) { cudaError_t code = last; last = cudaSuccess; return code; }
cudaError_t cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorName(cudaError_t code) { const char *name = ""; cuGetErrorName((CUresult)code, &name); return name; }
const char *cudaGetErrorString(cudaError_t code) { const char *text = ""; cuGetErrorString((CUresult)code, &text); return text; }

/* ---- streams, events, graphs ----------------------------------------------------------------------------------- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { IN(cuStreamCreate(stream, flags)); }
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { IN(cuStreamDestroy(stream)); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { IN(cuStreamSynchronize(stream)); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { IN(cuStreamWaitEvent(stream, event, flags)); }
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) { IN(cuStreamBeginCapture(stream, (CUstreamCaptureMode)mode)); }
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) { IN(cuStreamEndCapture(stream, graph)); }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status)
{
    IN(cuStreamIsCapturing(stream, (CUstreamCaptureStatus *)status));
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { IN(cuEventCreate(event, flags)); }
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { IN(cuEventDestroy(event)); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { (void)flags; IN(cuEventRecord(event, stream)); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { IN(cuEventSynchronize(event)); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) { (void)start, (void)end; *milliseconds = 1; return cudaSuccess; }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) { IN(cuGraphInstantiate(made, graph, flags)); }
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) { IN(cuGraphLaunch(graph, stream)); }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { IN(cuGraphDestroy(graph)); }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { IN(cuGraphExecDestroy(graph)); }

/* ---- memory ---------------------------------------------------------------------------------------------------- */

cudaError_t cudaMemset(void *target, int value, size_t size);
cudaError_t cudaMalloc(void **address, size_t size)
{
    TRY(enter());
    TRY(cuMemAlloc((CUdeviceptr *)address, size));
    return cudaMemset(*address, 0, size);
}
cudaError_t cudaFree(void *address) { TRY(enter()); return address ? told(cuMemFree((CUdeviceptr)address)) : cudaSuccess; }
cudaError_t cudaMallocFromPoolAsync(void **address, size_t size, cudaMemPool_t pool, cudaStream_t stream)
{
    IN(cuMemAllocFromPoolAsync((CUdeviceptr *)address, size, pool, stream));
}
cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) { IN(cuMemFreeAsync((CUdeviceptr)address, stream)); }
cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) { IN(cuMemHostAlloc(address, size, flags)); }
cudaError_t cudaMallocHost(void **address, size_t size) { return cudaHostAlloc(address, size, 0); }
cudaError_t cudaFreeHost(void *address) { TRY(enter()); return address ? told(cuMemFreeHost(address)) : cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *left, size_t *total) { IN(cuMemGetInfo(left, total)); }
cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const struct cudaMemPoolProps *properties) { IN(cuMemPoolCreate(pool, (const CUmemPoolProps *)properties)); }
cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) { IN(cuMemPoolDestroy(pool)); }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t keep) { IN(cuMemPoolTrimTo(pool, keep)); }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) { IN(cuMemPoolGetAttribute(pool, (CUmemPool_attribute)attribute, value)); }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) { IN(cuMemPoolSetAttribute(pool, (CUmemPool_attribute)attribute, value)); }
static CUresult copy(void *target, const void *source, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    if (kind == cudaMemcpyHostToDevice)
        return cuMemcpyHtoDAsync((CUdeviceptr)target, source, size, stream);
    if (kind == cudaMemcpyDeviceToHost)
        return cuMemcpyDtoHAsync(target, (CUdeviceptr)source, size, stream);
    return cuMemcpyAsync((CUdeviceptr)target, (CUdeviceptr)source, size, stream);
}
cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    IN(copy(target, source, size, kind, stream));
}
cudaError_t cudaMemcpy(void *target, const void *source, size_t size, enum cudaMemcpyKind kind)
{
    TRY(enter());
    TRY(copy(target, source, size, kind, NULL));
    return told(cuStreamSynchronize(NULL));
}
cudaError_t cudaMemcpy2DAsync(void *target, size_t pitch, const void *source, size_t source_pitch, size_t width, size_t height, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    TRY(enter());
    for (size_t row = 0; row < height; row++)
        TRY(copy((char *)target + row * pitch, (const char *)source + row * source_pitch, width, kind, stream));
    return cudaSuccess;
}
cudaError_t cudaMemcpyFromSymbol(void *target, const void *symbol, size_t size, size_t offset, enum cudaMemcpyKind kind)
{
    (void)symbol, (void)offset, (void)kind;
    memset(target, 0, size);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *target, int value, size_t size, cudaStream_t stream) { IN(cuMemsetD8Async((CUdeviceptr)target, (unsigned char)value, size, stream)); }
cudaError_t cudaMemset(void *target, int value, size_t size)
{
    TRY(enter());
    TRY(cuMemsetD8Async((CUdeviceptr)target, (unsigned char)value, size, NULL));
    return told(cuStreamSynchronize(NULL));
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address)
{
    memset(found, 0, sizeof *found);
    found->type = cudaMemoryTypeDevice, found->devicePointer = (void *)address;
    return cudaSuccess;
}
