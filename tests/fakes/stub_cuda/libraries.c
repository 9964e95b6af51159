/* cuBLAS, cuBLASLt and cuDNN without a GPU: what ONNX Runtime's CUDA provider calls of them, doing nothing.

   One file for three libraries, compiled with -DCUBLAS, -DCUBLASLT or -DCUDNN.  What they would launch is a kernel of
   the driver's all the same, so that it is counted, and captured where the stream is. */

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Of one handle: the stream that was set last. */
struct handle { cudaStream_t stream; };
static int make(void **made) { *made = calloc(1, 4096); return 0; }
static int drop(void *made) { free(made); return 0; }
static int work(struct handle *handle)
{
    dim3 one = {1, 1, 1};
    return cudaLaunchKernel(make, one, one, NULL, 0, handle ? handle->stream : NULL) ? 13 : 0;
}
#define MAKES(name) int name(void **made) { return make(made); }
#define DROPS(name) int name(void *made) { return drop(made); }
#define WORKS(name) int name(struct handle *handle) { return work(handle); }
#define NOTHING(name) int name(void) { return 0; }
#define STREAM(name) int name(struct handle *handle, cudaStream_t stream) { handle->stream = stream; return 0; }

#ifdef CUBLAS
MAKES(cublasCreate_v2) DROPS(cublasDestroy_v2) STREAM(cublasSetStream_v2) NOTHING(cublasSetMathMode)
NOTHING(cublasSetPointerMode_v2) NOTHING(cublasSetWorkspace_v2)
int cublasGetMathMode(void *handle, int *mode) { (void)handle; *mode = 0; return 0; }
const char *cublasGetStatusName(int status) { return status ? "CUBLAS_STATUS_EXECUTION_FAILED" : "CUBLAS_STATUS_SUCCESS"; }
const char *cublasGetStatusString(int status) { return cublasGetStatusName(status); }
WORKS(cublasSgemm_v2) WORKS(cublasDgemm_v2) WORKS(cublasSgemmBatched) WORKS(cublasDgemmBatched)
WORKS(cublasSgemmStridedBatched) WORKS(cublasDgemmStridedBatched) WORKS(cublasGemmEx) WORKS(cublasGemmBatchedEx)
WORKS(cublasGemmStridedBatchedEx) WORKS(cublasSgeam) WORKS(cublasDgeam) WORKS(cublasScopy_v2) WORKS(cublasSscal_v2)
WORKS(cublasSgetrfBatched) WORKS(cublasDgetrfBatched) WORKS(cublasSgetriBatched) WORKS(cublasDgetriBatched)
#endif

#ifdef CUBLASLT
MAKES(cublasLtCreate) DROPS(cublasLtDestroy)
#define DESCRIPTOR(name) MAKES(cublasLt##name##Create) DROPS(cublasLt##name##Destroy) NOTHING(cublasLt##name##SetAttribute)
DESCRIPTOR(MatmulDesc) DESCRIPTOR(MatmulPreference) DESCRIPTOR(MatrixLayout) DESCRIPTOR(MatrixTransformDesc)
NOTHING(cublasLtMatmulAlgoConfigSetAttribute) NOTHING(cublasLtMatmulAlgoInit)
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found)
{
    (void)handle, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference, (void)results;
    *found = wanted > 0;
    return 0;
}
int cublasLtMatmul(void *handle, void *operation, const void *alpha, const void *A, void *a, const void *B, void *b,
                   const void *beta, const void *C, void *c, void *D, void *d, const void *algorithm, void *workspace,
                   size_t size, cudaStream_t stream)
{
    (void)handle, (void)operation, (void)alpha, (void)A, (void)a, (void)B, (void)b, (void)beta, (void)C, (void)c;
    (void)D, (void)d, (void)algorithm, (void)workspace, (void)size;
    struct handle own = {stream};
    return work(&own);
}
NOTHING(cublasLtMatrixTransform)
#endif

#ifdef CUDNN
size_t cudnnGetVersion(void) { return 91200; }
size_t cudnnGetCudartVersion(void) { return CUDART_VERSION; }
const char *cudnnGetErrorString(int status) { return status ? "CUDNN_STATUS_EXECUTION_FAILED" : "CUDNN_STATUS_SUCCESS"; }
void cudnnGetLastErrorString(char *message, size_t size) { if (size) *message = 0; }
MAKES(cudnnCreate) DROPS(cudnnDestroy) STREAM(cudnnSetStream)
int cudnnGetStream(struct handle *handle, cudaStream_t *stream) { *stream = handle->stream; return 0; }
#define DESCRIPTOR(name) MAKES(cudnnCreate##name##Descriptor) DROPS(cudnnDestroy##name##Descriptor)
DESCRIPTOR(Tensor) DESCRIPTOR(Filter) DESCRIPTOR(Convolution) DESCRIPTOR(Activation) DESCRIPTOR(ReduceTensor)
NOTHING(cudnnSetTensorNdDescriptor) NOTHING(cudnnSetFilterNdDescriptor) NOTHING(cudnnSetConvolutionNdDescriptor)
NOTHING(cudnnSetConvolutionGroupCount) NOTHING(cudnnSetConvolutionMathType) NOTHING(cudnnSetActivationDescriptor)
NOTHING(cudnnSetReduceTensorDescriptor)
WORKS(cudnnAddTensor) WORKS(cudnnConvolutionForward) WORKS(cudnnActivationForward) WORKS(cudnnSoftmaxForward)
WORKS(cudnnReduceTensor) WORKS(cudnnConvolutionBiasActivationForward)
int cudnnGetReductionIndicesSize(void *handle, void *reduction, void *a, void *c, size_t *size)
{
    (void)handle, (void)reduction, (void)a, (void)c;
    *size = 0;
    return 0;
}
int cudnnGetReductionWorkspaceSize(void *handle, void *reduction, void *a, void *c, size_t *size)
{
    return cudnnGetReductionIndicesSize(handle, reduction, a, c, size);
}

/* The graph API: every operation is supported, by one engine without settings, which needs no workspace and uses tensor
   cores if a test says so.  Who forbids these is left without an engine then, and asks for heuristics again. */
enum { HEURISTICS = 4, PLAN = 5 }; /* kinds of descriptors */
static int tensor_cores, asked, planned;
void stub_use_tensor_cores(void) { tensor_cores = 1; }
int stub_refused(void) { return asked - planned; }
int cudnnBackendCreateDescriptor(int type, void **made)
{
    asked += type == HEURISTICS;
    planned += type == PLAN;
    return make(made);
}
DROPS(cudnnBackendDestroyDescriptor) NOTHING(cudnnBackendSetAttribute) NOTHING(cudnnBackendFinalize)
WORKS(cudnnBackendExecute)
enum { HANDLE = 0, DATA_TYPE = 1, BOOLEAN = 2, INT64 = 3, DESCRIPTOR_TYPE = 15 };
enum { CONFIG_DETAILS = 301, CONFIG_KNOBS = 302, ENGINE_KNOBS = 1302, ENGINE_NUMERICS = 1303, ENGINE_LAST = 1305 };
int cudnnBackendGetAttribute(void *descriptor, int attribute, int type, int64_t wanted, int64_t *found, void *values)
{
    (void)descriptor;
    if (attribute == ENGINE_NUMERICS) { /* one note, 0: tensor cores */
        if (found) *found = tensor_cores;
        if (tensor_cores && wanted > 0 && values) memset(values, 0, 4);
        return 0;
    }
    int64_t count = attribute != CONFIG_DETAILS && attribute != CONFIG_KNOBS &&
                    (attribute < ENGINE_KNOBS || attribute > ENGINE_LAST);
    if (found) *found = count;
    if (wanted > 0 && values && count && type != DESCRIPTOR_TYPE) /* descriptors are the caller's */
        memset(values, 0, type == HANDLE || type == INT64 ? 8 : type == BOOLEAN ? 1 : 4);
    return 0;
}
#endif
