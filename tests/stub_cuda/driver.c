/* A CUDA driver without a GPU: a libcuda.so.1 for tests.

   The real cuda.core, and a real TensorRT with its CUDA runtime, open it like the driver and find one GPU of compute
   capability 9.0 with 140 GB.  Memory is the host's, copies copy, streams do at once what they are given, a captured
   stream keeps it for its graph, and kernels do nothing.

   What this proves: that our calls exist, take these arguments in this order and are allowed in this state (a context
   is current, memory is alive and large enough, nothing forbidden happens during a capture, nothing is closed twice);
   which path the real libraries take through them; that the real parser takes our graphs.
   What it does not: any number, any speed, any order between streams.  Kernels compute nothing.

   It is as strict as the driver where the driver is: addresses of GPU memory cannot be read by the host, memory that
   was freed is never given out again, and the errors of a capture are those that CUDA documents ("Stream Management",
   cuStreamBeginCapture; "potentially unsafe" calls).

   Environment: STUB_TRACE=1 prints every call that changes something; STUB_MEMORY is the GPU's memory in bytes.
   Functions named stub_… are for tests, by ctypes.  Build: build.py. */

#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "driver.h"

/* ---- what happened, and one lock around everything ------------------------------------------------------------- */

static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static void unlock(pthread_mutex_t **held) { pthread_mutex_unlock(*held); }
#define LOCKED __attribute__((cleanup(unlock))) pthread_mutex_t *held = (pthread_mutex_lock(&mutex), &mutex)

static struct { uint64_t kernels, copies, fills, graph_launches, waits, captures; } counts;
static double now; /* of the GPU's clock, in milliseconds: work moves it on */

uint64_t stub_kernels(void) { return counts.kernels; }
uint64_t stub_copies(void) { return counts.copies; }
uint64_t stub_graph_launches(void) { return counts.graph_launches; }
uint64_t stub_waits(void) { return counts.waits; }

void stub_trace(const char *format, ...)
{
    static int wanted = -1;
    if (wanted < 0)
        wanted = getenv("STUB_TRACE") != NULL;
    if (!wanted)
        return;
    va_list arguments;
    va_start(arguments, format);
    fputs("[stub] ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
}

#define TRACE(...) stub_trace(__VA_ARGS__)
#define OK CUDA_SUCCESS
#define TRY(call) do { CUresult tried = (call); if (tried != OK) return tried; } while (0)

/* ---- contexts -------------------------------------------------------------------------------------------------- */

struct CUctx_st { int retained; unsigned flags; };
static struct CUctx_st primary;
static __thread CUcontext current;
static bool initialized;

static CUresult ready(void) { return !initialized ? CUDA_ERROR_NOT_INITIALIZED : current ? OK : CUDA_ERROR_INVALID_CONTEXT; }

CUresult cuInit(unsigned flags) { initialized = true; return flags ? CUDA_ERROR_INVALID_VALUE : OK; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return OK; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return initialized ? OK : CUDA_ERROR_NOT_INITIALIZED; }
CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    *device = 0;
    return !initialized ? CUDA_ERROR_NOT_INITIALIZED : ordinal == 0 ? OK : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    LOCKED;
    primary.retained++;
    *context = &primary;
    return device ? CUDA_ERROR_INVALID_DEVICE : OK;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice device)
{
    LOCKED;
    return primary.retained-- > 0 && !device ? OK : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active)
{
    *flags = primary.flags, *active = primary.retained > 0;
    return device ? CUDA_ERROR_INVALID_DEVICE : OK;
}
CUresult cuDevicePrimaryCtxSetFlags(CUdevice device, unsigned flags) { primary.flags = flags; return device ? CUDA_ERROR_INVALID_DEVICE : OK; }
CUresult cuDevicePrimaryCtxReset(CUdevice device) { return device ? CUDA_ERROR_INVALID_DEVICE : OK; }
CUresult cuCtxSetCurrent(CUcontext context) { current = context; return initialized ? OK : CUDA_ERROR_NOT_INITIALIZED; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = current; return initialized ? OK : CUDA_ERROR_NOT_INITIALIZED; }
CUresult cuCtxPushCurrent(CUcontext context) { current = context; return OK; }
CUresult cuCtxPopCurrent(CUcontext *context)
{
    if (context)
        *context = current;
    current = NULL; /* nothing here pushes more than one */
    return OK;
}
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return ready(); }
CUresult cuCtxGetFlags(unsigned *flags) { *flags = primary.flags; return ready(); }
CUresult cuCtxGetId(CUcontext context, unsigned long long *id) { (void)context; *id = 1; return OK; }
CUresult cuCtxGetApiVersion(CUcontext context, unsigned *version) { (void)context; *version = 3020; return OK; }
CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest)
{
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return ready();
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { (void)limit; *value = 1 << 20; return ready(); }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { (void)limit, (void)value; return ready(); }
CUresult cuCtxGetCacheConfig(CUfunc_cache *config) { *config = CU_FUNC_CACHE_PREFER_NONE; return ready(); }
CUresult cuCtxSetCacheConfig(CUfunc_cache config) { (void)config; return ready(); }

/* ---- the device ------------------------------------------------------------------------------------------------ */

static size_t capacity(void)
{
    const char *given = getenv("STUB_MEMORY");
    return given ? strtoull(given, NULL, 10) : 140ull << 30;
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device)
{
    snprintf(name, length, "%s", "NVIDIA H200");
    return device ? CUDA_ERROR_INVALID_DEVICE : OK;
}
CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) { *bytes = capacity(); return device ? CUDA_ERROR_INVALID_DEVICE : OK; }
CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) { memset(uuid, 0x5a, sizeof *uuid); return device ? CUDA_ERROR_INVALID_DEVICE : OK; }
CUresult cuDeviceGetPCIBusId(char *id, int length, CUdevice device)
{
    snprintf(id, length, "%s", "0000:01:00.0");
    return device ? CUDA_ERROR_INVALID_DEVICE : OK;
}
CUresult cuDeviceGetByPCIBusId(CUdevice *device, const char *id) { (void)id; *device = 0; return OK; }
CUresult cuDeviceCanAccessPeer(int *can, CUdevice one, CUdevice other) { (void)one, (void)other; *can = 0; return OK; }
CUresult cuDeviceComputeCapability(int *major, int *minor, CUdevice device) { (void)device; *major = 9, *minor = 0; return OK; }

/* Those that are neither 0 nor 1, of an H200. */
static const struct { CUdevice_attribute attribute; int value; } ATTRIBUTES[] = {
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z, 64},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, 2147483647},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, 65535},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z, 65535},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 49152},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 232448},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 233472},
    {CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK, 1024},
    {CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY, 65536},
    {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
    {CU_DEVICE_ATTRIBUTE_MAX_PITCH, 2147483647},
    {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536},
    {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR, 65536},
    {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1980000},
    {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 3201000},
    {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 6144},
    {CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 62914560},
    {CU_DEVICE_ATTRIBUTE_MAX_PERSISTING_L2_CACHE_SIZE, 39321600},
    {CU_DEVICE_ATTRIBUTE_MAX_ACCESS_POLICY_WINDOW_SIZE, 134217728},
    {CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT, 512},
    {CU_DEVICE_ATTRIBUTE_TEXTURE_PITCH_ALIGNMENT, 32},
    {CU_DEVICE_ATTRIBUTE_SURFACE_ALIGNMENT, 512},
    {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132},
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, 2048},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR, 32},
    {CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, 3},
    {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
    {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0},
    {CU_DEVICE_ATTRIBUTE_SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO, 2},
    {CU_DEVICE_ATTRIBUTE_KERNEL_EXEC_TIMEOUT, 0},
    {CU_DEVICE_ATTRIBUTE_INTEGRATED, 0},
    {CU_DEVICE_ATTRIBUTE_COMPUTE_MODE, CU_COMPUTEMODE_DEFAULT},
    {CU_DEVICE_ATTRIBUTE_MULTI_GPU_BOARD, 0},
    {CU_DEVICE_ATTRIBUTE_TCC_DRIVER, 0},
    {CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS, 0},
    {CU_DEVICE_ATTRIBUTE_DIRECT_MANAGED_MEM_ACCESS_FROM_HOST, 0},
};

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device)
{
    *value = 1; /* supported */
    for (size_t i = 0; i < sizeof ATTRIBUTES / sizeof *ATTRIBUTES; i++)
        if (ATTRIBUTES[i].attribute == attribute)
            *value = ATTRIBUTES[i].value;
    return device ? CUDA_ERROR_INVALID_DEVICE : OK;
}

/* ---- memory ---------------------------------------------------------------------------------------------------- */

/* Three stretches of addresses.  DEVICE is what the GPU's memory is called: the host can neither read nor write there.
   What it holds lies in SHADOW, at the same distance from the start.  PINNED is the host's and the GPU's alike.
   Addresses are used once, with a gap after each block. */
#define STRETCH (8ull << 40)
#define PAGE 4096ull
enum kind { DEVICE, SHADOW, PINNED };
static char *stretches[3];
static size_t next_free[3];

struct block { char *start; size_t size; bool live; };
static struct { struct block *all; size_t count, room; } blocks[3]; /* by address, which only grows */
static size_t used; /* of the GPU's memory */

__attribute__((constructor)) static void reserve(void)
{
    for (int kind = 0; kind < 3; kind++)
        stretches[kind] = mmap(NULL, STRETCH, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static bool within(enum kind kind, const void *address)
{
    return (const char *)address >= stretches[kind] && (const char *)address < stretches[kind] + STRETCH;
}

static CUresult allocate(enum kind kind, size_t size, void **address)
{
    LOCKED;
    if (!size)
        return CUDA_ERROR_INVALID_VALUE;
    if (kind == DEVICE && used + size > capacity())
        return CUDA_ERROR_OUT_OF_MEMORY;
    size_t room = (size + PAGE - 1) / PAGE * PAGE, place = next_free[kind];
    if (place + room + PAGE > STRETCH)
        return CUDA_ERROR_OUT_OF_MEMORY;
    if (mprotect(stretches[kind == DEVICE ? SHADOW : PINNED] + place, room, PROT_READ | PROT_WRITE))
        return CUDA_ERROR_OUT_OF_MEMORY;
    next_free[kind] += room + PAGE;
    if (blocks[kind].count == blocks[kind].room) {
        blocks[kind].room = blocks[kind].room * 2 + 1024;
        blocks[kind].all = realloc(blocks[kind].all, blocks[kind].room * sizeof(struct block));
    }
    blocks[kind].all[blocks[kind].count++] = (struct block){stretches[kind] + place, size, true};
    used += kind == DEVICE ? size : 0;
    *address = stretches[kind] + place;
    return OK;
}

/* The live block that `address` lies in, or NULL. */
static struct block *find(enum kind kind, const void *address)
{
    size_t low = 0, high = blocks[kind].count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (blocks[kind].all[middle].start <= (const char *)address)
            low = middle + 1;
        else
            high = middle;
    }
    struct block *block = low ? &blocks[kind].all[low - 1] : NULL;
    return block && block->live && (const char *)address < block->start + block->size ? block : NULL;
}

static CUresult release(enum kind kind, void *address)
{
    LOCKED;
    struct block *block = find(kind, address);
    if (!block || block->start != address)
        return CUDA_ERROR_INVALID_VALUE;
    block->live = false;
    used -= kind == DEVICE ? block->size : 0;
    char *memory = kind == DEVICE ? stretches[SHADOW] + (block->start - stretches[DEVICE]) : block->start;
    size_t room = (block->size + PAGE - 1) / PAGE * PAGE;
    madvise(memory, room, MADV_DONTNEED);
    mprotect(memory, room, PROT_NONE);
    return OK;
}

size_t stub_used(void) { return used; }
size_t stub_live(int kind)
{
    LOCKED;
    size_t live = 0;
    for (size_t i = 0; i < blocks[kind].count; i++)
        live += blocks[kind].all[i].live;
    return live;
}

/* Where the bytes lie that `address` names.  NULL: not in one live block.  Other addresses are the host's own. */
static void *bytes_at(const void *address, size_t size)
{
    for (int kind = 0; kind < 3; kind++) {
        if (!within(kind, address))
            continue;
        struct block *block = kind == SHADOW ? NULL : find(kind, address);
        if (!block || (const char *)address + size > block->start + block->size)
            return NULL;
        return kind == PINNED ? (void *)address : stretches[SHADOW] + ((const char *)address - stretches[DEVICE]);
    }
    return (void *)address;
}

/* ---- streams, captures, graphs --------------------------------------------------------------------------------- */

enum operation { KERNEL, COPY, FILL, HOST, ALLOCATION, FREEING, EMPTY, CHILD };
struct CUgraphNode_st {
    enum operation operation;
    void *target;
    const void *source;
    size_t size, pitch, rows, source_pitch;
    unsigned value, width; /* of a fill: `width` bytes at a time */
    CUhostFn call;
    CUgraph child;
};
struct CUgraph_st { struct CUgraphNode_st **nodes; size_t count, room; int holders; bool child; };
struct CUgraphExec_st { struct CUgraph_st *graph; bool alive; };

struct capture { CUgraph graph; CUstream origin; CUstreamCaptureMode mode; pthread_t thread; bool invalid; uint64_t id; };
struct CUstream_st { struct capture *capture; unsigned flags; int priority; bool alive; };
struct CUevent_st { double at; struct capture *capture; unsigned flags; bool recorded, alive; };

#define MAX_CAPTURES 64
static struct capture *captures[MAX_CAPTURES]; /* those under way */
static __thread CUstreamCaptureMode thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

static bool is_default(CUstream stream) { return !stream || stream == CU_STREAM_LEGACY || stream == CU_STREAM_PER_THREAD; }
static struct capture *capture_of(CUstream stream) { return is_default(stream) ? NULL : stream->capture; }

static CUresult usable(CUstream stream)
{
    TRY(ready());
    return is_default(stream) || stream->alive ? OK : CUDA_ERROR_INVALID_HANDLE;
}

/* For calls that might wait for a stream that is captured, or that do so in the legacy default stream. */
static CUresult safe(const char *call)
{
    TRY(ready());
    LOCKED;
    for (int i = 0; i < MAX_CAPTURES; i++) {
        struct capture *capture = captures[i];
        if (!capture || thread_mode == CU_STREAM_CAPTURE_MODE_RELAXED || capture->mode == CU_STREAM_CAPTURE_MODE_RELAXED)
            continue;
        bool own = pthread_equal(capture->thread, pthread_self());
        bool others = capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL && thread_mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
        if (own || others) {
            TRACE("%s during a capture", call);
            capture->invalid = true;
            return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        }
    }
    return OK;
}

/* Work in the legacy default stream waits for all streams that do not opt out; those must not be captured. */
static CUresult implicit(CUstream stream)
{
    for (int i = 0; i < MAX_CAPTURES; i++)
        if (captures[i] && (!stream || stream == CU_STREAM_LEGACY) &&
            !(captures[i]->origin->flags & CU_STREAM_NON_BLOCKING)) {
            captures[i]->invalid = true;
            return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
        }
    return OK;
}

static CUgraphNode add(CUgraph graph, struct CUgraphNode_st node)
{
    if (graph->count == graph->room)
        graph->nodes = realloc(graph->nodes, (graph->room = graph->room * 2 + 16) * sizeof *graph->nodes);
    CUgraphNode kept = malloc(sizeof node);
    *kept = node;
    return graph->nodes[graph->count++] = kept;
}

static CUresult run_graph(CUgraph graph);

static void fill(char *target, unsigned value, unsigned width, size_t count)
{
    for (size_t i = 0; i < count; i++)
        memcpy(target + i * width, &value, width);
}

static CUresult run(const struct CUgraphNode_st *node)
{
    size_t rows = node->rows ? node->rows : 1;
    size_t span = node->rows ? node->pitch * (rows - 1) + node->size : node->size;
    size_t source_span = node->rows ? node->source_pitch * (rows - 1) + node->size : node->size;
    char *target = NULL, *source = NULL;
    if (node->operation == COPY || node->operation == FILL) {
        if (!(target = bytes_at(node->target, span)))
            return CUDA_ERROR_ILLEGAL_ADDRESS;
        if (node->operation == COPY && !(source = bytes_at(node->source, source_span)))
            return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    now += 0.002;
    switch (node->operation) {
    case KERNEL: counts.kernels++, now += 0.003; break;
    case COPY:
        counts.copies++, now += span / 1e9;
        for (size_t row = 0; row < rows; row++)
            memmove(target + row * node->pitch, source + row * node->source_pitch, node->size);
        break;
    case FILL:
        counts.fills++;
        for (size_t row = 0; row < rows; row++)
            fill(target + row * node->pitch, node->value, node->width, node->size / node->width);
        break;
    case HOST: node->call((void *)node->source); break;
    case FREEING: return release(DEVICE, node->target);
    case CHILD: return run_graph(node->child);
    case ALLOCATION: case EMPTY: break;
    }
    return OK;
}

static CUresult run_graph(CUgraph graph)
{
    for (size_t i = 0; i < graph->count; i++)
        TRY(run(graph->nodes[i]));
    return OK;
}

/* Do it now, or keep it where the stream is captured. */
static CUresult submit(CUstream stream, const char *what, struct CUgraphNode_st node)
{
    LOCKED;
    TRY(usable(stream));
    TRY(implicit(stream));
    struct capture *capture = capture_of(stream);
    TRACE("%s%s of %zu bytes", capture ? "captured " : "", what, node.size);
    if (!capture)
        return run(&node);
    if (capture->invalid)
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    add(capture->graph, node);
    return OK;
}

CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority)
{
    TRY(ready());
    *stream = calloc(1, sizeof **stream);
    **stream = (struct CUstream_st){NULL, flags, priority, true};
    TRACE("stream %p", (void *)*stream);
    return OK;
}
CUresult cuStreamCreate(CUstream *stream, unsigned flags) { return cuStreamCreateWithPriority(stream, flags, 0); }
CUresult cuStreamDestroy(CUstream stream)
{
    TRY(usable(stream));
    TRACE("stream %p destroyed", (void *)stream);
    stream->alive = false; /* kept, so that later use is found out */
    return OK;
}
CUresult cuStreamSynchronize(CUstream stream)
{
    LOCKED;
    TRY(usable(stream));
    if (capture_of(stream)) {
        stream->capture->invalid = true;
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    TRACE("waited for a stream");
    counts.waits++;
    return implicit(stream);
}
CUresult cuStreamQuery(CUstream stream) { return capture_of(stream) ? cuStreamSynchronize(stream) : safe(__func__); }
CUresult cuCtxSynchronize(void) { counts.waits++; return safe(__func__); }
CUresult cuStreamGetFlags(CUstream stream, unsigned *flags) { *flags = is_default(stream) ? 0 : stream->flags; return usable(stream); }
CUresult cuStreamGetPriority(CUstream stream, int *priority) { *priority = is_default(stream) ? 0 : stream->priority; return usable(stream); }
CUresult cuStreamGetId(CUstream stream, unsigned long long *id) { *id = (uintptr_t)stream; return usable(stream); }
#undef cuStreamGetCtx
CUresult cuStreamGetCtx(CUstream stream, CUcontext *context) { *context = &primary; return usable(stream); }
CUresult cuStreamGetCtx_v2(CUstream stream, CUcontext *context, CUgreenCtx *green) { *green = NULL; return cuStreamGetCtx(stream, context); }
CUresult cuStreamGetDevice(CUstream stream, CUdevice *device) { *device = 0; return usable(stream); }
CUresult cuStreamSetAttribute(CUstream stream, CUstreamAttrID attribute, const CUstreamAttrValue *value) { (void)attribute, (void)value; return usable(stream); }
CUresult cuStreamGetAttribute(CUstream stream, CUstreamAttrID attribute, CUstreamAttrValue *value) { (void)attribute; memset(value, 0, sizeof *value); return usable(stream); }

CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode)
{
    LOCKED;
    static uint64_t ids;
    TRY(usable(stream));
    if (is_default(stream))
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (stream->capture)
        return CUDA_ERROR_ILLEGAL_STATE;
    struct capture *capture = calloc(1, sizeof *capture);
    *capture = (struct capture){calloc(1, sizeof(struct CUgraph_st)), stream, mode, pthread_self(), false, ++ids};
    capture->graph->holders = 1;
    int place = 0;
    while (captures[place])
        place++;
    captures[place] = stream->capture = capture;
    counts.captures++;
    TRACE("capture begins, mode %d", mode);
    return OK;
}
CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph)
{
    LOCKED;
    TRY(usable(stream));
    struct capture *capture = capture_of(stream);
    *graph = NULL;
    if (!capture)
        return CUDA_ERROR_ILLEGAL_STATE;
    if (capture->origin != stream)
        return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED && !pthread_equal(capture->thread, pthread_self()))
        return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    for (int i = 0; i < MAX_CAPTURES; i++)
        if (captures[i] == capture)
            captures[i] = NULL;
    stream->capture = NULL;
    TRACE("capture ends with %zu nodes%s", capture->graph->count, capture->invalid ? ", invalid" : "");
    if (capture->invalid)
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    *graph = capture->graph;
    return OK;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status)
{
    struct capture *capture = capture_of(stream);
    *status = !capture ? CU_STREAM_CAPTURE_STATUS_NONE
              : capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    return usable(stream);
}
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode)
{
    CUstreamCaptureMode before = thread_mode;
    thread_mode = *mode, *mode = before;
    return OK;
}
static CUresult capture_info(CUstream stream, CUstreamCaptureStatus *status, cuuint64_t *id, CUgraph *graph, size_t *count)
{
    struct capture *capture = capture_of(stream);
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = capture ? capture->graph : NULL;
    if (count) *count = 0;
    return cuStreamIsCapturing(stream, status);
}
#undef cuStreamGetCaptureInfo
CUresult cuStreamGetCaptureInfo(CUstream stream, CUstreamCaptureStatus *status, cuuint64_t *id) { return capture_info(stream, status, id, NULL, NULL); }
CUresult cuStreamGetCaptureInfo_v2(CUstream stream, CUstreamCaptureStatus *status, cuuint64_t *id, CUgraph *graph, const CUgraphNode **nodes, size_t *count)
{
    if (nodes) *nodes = NULL;
    return capture_info(stream, status, id, graph, count);
}
CUresult cuStreamGetCaptureInfo_v3(CUstream stream, CUstreamCaptureStatus *status, cuuint64_t *id, CUgraph *graph, const CUgraphNode **nodes, const CUgraphEdgeData **edges, size_t *count)
{
    if (edges) *edges = NULL;
    return cuStreamGetCaptureInfo_v2(stream, status, id, graph, nodes, count);
}

CUresult cuGraphCreate(CUgraph *graph, unsigned flags)
{
    *graph = calloc(1, sizeof **graph);
    (*graph)->holders = 1;
    return flags ? CUDA_ERROR_INVALID_VALUE : OK;
}
CUresult cuGraphDestroy(CUgraph graph)
{
    LOCKED;
    TRACE("graph destroyed");
    return graph->holders-- > 0 ? OK : CUDA_ERROR_INVALID_VALUE;
}
static CUresult instantiate(CUgraphExec *made, CUgraph graph)
{
    LOCKED;
    if (graph->holders < 1)
        return CUDA_ERROR_INVALID_VALUE;
    CUgraph copy = calloc(1, sizeof *copy);
    for (size_t i = 0; i < graph->count; i++)
        add(copy, *graph->nodes[i]);
    *made = malloc(sizeof **made);
    **made = (struct CUgraphExec_st){copy, true};
    TRACE("graph of %zu nodes instantiated", copy->count);
    return OK;
}
#undef cuGraphInstantiate
CUresult cuGraphInstantiateWithFlags(CUgraphExec *made, CUgraph graph, unsigned long long flags) { (void)flags; return instantiate(made, graph); }
CUresult cuGraphInstantiateWithParams(CUgraphExec *made, CUgraph graph, CUDA_GRAPH_INSTANTIATE_PARAMS *params)
{
    params->result_out = CUDA_GRAPH_INSTANTIATE_SUCCESS, params->hErrNode_out = NULL;
    return instantiate(made, graph);
}
CUresult cuGraphInstantiate_v2(CUgraphExec *made, CUgraph graph, CUgraphNode *node, char *log, size_t size)
{
    if (node) *node = NULL;
    if (log && size) *log = 0;
    return instantiate(made, graph);
}
CUresult cuGraphExecUpdate(CUgraphExec made, CUgraph graph, CUgraphExecUpdateResultInfo *info)
{
    memset(info, 0, sizeof *info);
    return made->alive && made->graph->count == graph->count ? OK : CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE;
}
CUresult cuGraphExecDestroy(CUgraphExec made)
{
    LOCKED;
    bool alive = made->alive;
    made->alive = false;
    TRACE("executable graph destroyed");
    return alive ? OK : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGraphUpload(CUgraphExec made, CUstream stream)
{
    TRY(usable(stream));
    return made->alive ? capture_of(stream) ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : OK : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGraphLaunch(CUgraphExec made, CUstream stream)
{
    LOCKED;
    TRY(usable(stream));
    if (!made->alive)
        return CUDA_ERROR_INVALID_VALUE;
    if (capture_of(stream)) /* becomes a child graph */
        return submit(stream, "graph", (struct CUgraphNode_st){.operation = CHILD, .child = made->graph});
    TRACE("graph of %zu nodes launched", made->graph->count);
    counts.graph_launches++;
    return run_graph(made->graph);
}
CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode *nodes, size_t *count)
{
    if (nodes)
        for (size_t i = 0; i < *count && i < graph->count; i++)
            nodes[i] = graph->nodes[i];
    else
        *count = graph->count;
    return OK;
}
CUresult cuGraphNodeGetType(CUgraphNode node, CUgraphNodeType *type)
{
    static const CUgraphNodeType TYPES[] = {
        CU_GRAPH_NODE_TYPE_KERNEL, CU_GRAPH_NODE_TYPE_MEMCPY, CU_GRAPH_NODE_TYPE_MEMSET, CU_GRAPH_NODE_TYPE_HOST,
        CU_GRAPH_NODE_TYPE_MEM_ALLOC, CU_GRAPH_NODE_TYPE_MEM_FREE, CU_GRAPH_NODE_TYPE_EMPTY, CU_GRAPH_NODE_TYPE_GRAPH};
    *type = TYPES[node->operation];
    return OK;
}
CUresult cuGraphRetainUserObject(CUgraph graph, CUuserObject object, unsigned count, unsigned flags) { (void)graph, (void)object, (void)count, (void)flags; return OK; }
CUresult cuGraphReleaseUserObject(CUgraph graph, CUuserObject object, unsigned count) { (void)graph, (void)object, (void)count; return OK; }
CUresult cuUserObjectCreate(CUuserObject *object, void *ptr, CUhostFn destroy, unsigned count, unsigned flags) { (void)ptr, (void)destroy, (void)count, (void)flags; *object = calloc(1, 8); return OK; }
CUresult cuUserObjectRelease(CUuserObject object, unsigned count) { (void)object, (void)count; return OK; }

/* ---- events ---------------------------------------------------------------------------------------------------- */

CUresult cuEventCreate(CUevent *event, unsigned flags)
{
    TRY(ready());
    *event = malloc(sizeof **event);
    **event = (struct CUevent_st){.flags = flags, .alive = true};
    return OK;
}
CUresult cuEventDestroy(CUevent event)
{
    bool alive = event->alive;
    event->alive = false;
    return alive ? OK : CUDA_ERROR_INVALID_HANDLE;
}
CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned flags)
{
    LOCKED;
    TRY(usable(stream));
    if (!event->alive)
        return CUDA_ERROR_INVALID_HANDLE;
    if (!(flags & CU_EVENT_RECORD_EXTERNAL))
        event->capture = capture_of(stream);
    event->recorded = true, event->at = now;
    return OK;
}
CUresult cuEventRecord(CUevent event, CUstream stream) { return cuEventRecordWithFlags(event, stream, 0); }
CUresult cuEventSynchronize(CUevent event)
{
    LOCKED;
    TRY(ready());
    if (!event->alive)
        return CUDA_ERROR_INVALID_HANDLE;
    if (event->capture) {
        event->capture->invalid = true;
        return CUDA_ERROR_CAPTURED_EVENT;
    }
    counts.waits++;
    TRACE("waited for an event");
    return OK;
}
CUresult cuEventQuery(CUevent event) { return event->capture ? CUDA_ERROR_CAPTURED_EVENT : event->alive ? safe(__func__) : CUDA_ERROR_INVALID_HANDLE; }
#undef cuEventElapsedTime
CUresult cuEventElapsedTime_v2(float *milliseconds, CUevent start, CUevent end)
{
    if (!start->recorded || !end->recorded || (start->flags | end->flags) & CU_EVENT_DISABLE_TIMING)
        return CUDA_ERROR_INVALID_HANDLE;
    *milliseconds = (float)(end->at - start->at);
    return OK;
}
CUresult cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end) { return cuEventElapsedTime_v2(milliseconds, start, end); }
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags)
{
    LOCKED;
    (void)flags;
    TRY(usable(stream));
    if (!event->alive)
        return CUDA_ERROR_INVALID_HANDLE;
    if (event->capture && !is_default(stream)) {
        if (stream->capture && stream->capture != event->capture)
            return CUDA_ERROR_STREAM_CAPTURE_MERGE;
        stream->capture = event->capture; /* joins the capture */
    } else if (event->capture)
        return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    else if (capture_of(stream))
        return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    return OK;
}

/* ---- memory: the calls ----------------------------------------------------------------------------------------- */

CUresult cuMemAlloc(CUdeviceptr *address, size_t size)
{
    TRY(safe(__func__));
    TRACE("allocation of %zu bytes", size);
    return allocate(DEVICE, size, (void **)address);
}
CUresult cuMemFree(CUdeviceptr address)
{
    TRY(safe(__func__));
    return address ? release(DEVICE, (void *)address) : OK;
}
CUresult cuMemHostAlloc(void **address, size_t size, unsigned flags)
{
    (void)flags;
    TRY(safe(__func__));
    TRACE("pinned allocation of %zu bytes", size);
    return allocate(PINNED, size, address);
}
CUresult cuMemAllocHost(void **address, size_t size) { return cuMemHostAlloc(address, size, 0); }
CUresult cuMemFreeHost(void *address) { TRY(safe(__func__)); return release(PINNED, address); }
CUresult cuMemAllocManaged(CUdeviceptr *address, size_t size, unsigned flags) { return cuMemHostAlloc((void **)address, size, flags); }
CUresult cuMemAllocPitch(CUdeviceptr *address, size_t *pitch, size_t width, size_t height, unsigned element)
{
    (void)element;
    *pitch = (width + 511) / 512 * 512;
    return cuMemAlloc(address, *pitch * height);
}
CUresult cuMemHostGetDevicePointer(CUdeviceptr *address, void *pinned, unsigned flags)
{
    (void)flags;
    *address = (CUdeviceptr)pinned;
    return find(PINNED, pinned) ? OK : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemHostGetFlags(unsigned *flags, void *pinned) { *flags = 0; return find(PINNED, pinned) ? OK : CUDA_ERROR_INVALID_VALUE; }
CUresult cuMemHostRegister(void *address, size_t size, unsigned flags) { (void)address, (void)size, (void)flags; return ready(); }
CUresult cuMemHostUnregister(void *address) { (void)address; return ready(); }
CUresult cuMemGetInfo(size_t *left, size_t *total)
{
    *total = capacity(), *left = *total - used;
    return ready();
}
CUresult cuMemGetAddressRange(CUdeviceptr *start, size_t *size, CUdeviceptr address)
{
    LOCKED;
    struct block *block = find(DEVICE, (void *)address);
    block = block ? block : find(PINNED, (void *)address);
    if (!block)
        return CUDA_ERROR_NOT_FOUND;
    if (start) *start = (CUdeviceptr)block->start;
    if (size) *size = block->size;
    return OK;
}

/* Pools give out the GPU's memory in the order of a stream; here that is at once. */
struct CUmemPoolHandle_st { bool alive; };
static struct CUmemPoolHandle_st default_pool = {true};

CUresult cuMemPoolCreate(CUmemoryPool *pool, const CUmemPoolProps *properties)
{
    TRY(ready());
    if (properties->allocType != CU_MEM_ALLOCATION_TYPE_PINNED)
        return CUDA_ERROR_INVALID_VALUE;
    *pool = malloc(sizeof **pool);
    (*pool)->alive = true;
    TRACE("pool of at most %zu bytes", properties->maxSize);
    return OK;
}
CUresult cuMemPoolDestroy(CUmemoryPool pool)
{
    bool alive = pool->alive;
    pool->alive = false;
    TRACE("pool destroyed");
    return alive && pool != &default_pool ? OK : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice device) { (void)device; *pool = &default_pool; return OK; }
CUresult cuDeviceGetMemPool(CUmemoryPool *pool, CUdevice device) { return cuDeviceGetDefaultMemPool(pool, device); }
CUresult cuDeviceSetMemPool(CUdevice device, CUmemoryPool pool) { (void)device, (void)pool; return OK; }
CUresult cuMemPoolSetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void *value) { (void)attribute, (void)value; return pool->alive ? OK : CUDA_ERROR_INVALID_VALUE; }
CUresult cuMemPoolGetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void *value)
{
    *(cuuint64_t *)value = attribute == CU_MEMPOOL_ATTR_USED_MEM_CURRENT ? used : 0;
    return pool->alive ? OK : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemPoolSetAccess(CUmemoryPool pool, const CUmemAccessDesc *map, size_t count) { (void)pool, (void)map, (void)count; return OK; }
CUresult cuMemPoolGetAccess(CUmemAccess_flags *flags, CUmemoryPool pool, CUmemLocation *location) { (void)pool, (void)location; *flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE; return OK; }
CUresult cuMemPoolTrimTo(CUmemoryPool pool, size_t keep) { (void)keep; return pool->alive ? OK : CUDA_ERROR_INVALID_VALUE; }
CUresult cuMemAllocFromPoolAsync(CUdeviceptr *address, size_t size, CUmemoryPool pool, CUstream stream)
{
    TRY(usable(stream));
    if (!pool->alive)
        return CUDA_ERROR_INVALID_VALUE;
    TRACE("%spool allocation of %zu bytes", capture_of(stream) ? "captured " : "", size);
    TRY(allocate(DEVICE, size, (void **)address));
    if (!capture_of(stream))
        return OK;
    return submit(stream, "allocation", (struct CUgraphNode_st){.operation = ALLOCATION, .target = (void *)*address, .size = size});
}
CUresult cuMemAllocAsync(CUdeviceptr *address, size_t size, CUstream stream) { return cuMemAllocFromPoolAsync(address, size, &default_pool, stream); }
CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream) { return submit(stream, "freeing", (struct CUgraphNode_st){.operation = FREEING, .target = (void *)address}); }

static CUresult copy(CUstream stream, const char *what, void *target, const void *source, size_t size)
{
    if (!size)
        return OK;
    return submit(stream, what, (struct CUgraphNode_st){.operation = COPY, .target = target, .source = source, .size = size});
}
static bool known(const void *address) { return within(DEVICE, address) || within(PINNED, address); }

CUresult cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream) { return copy(stream, "copy", (void *)target, (void *)source, size); }
CUresult cuMemcpyHtoDAsync(CUdeviceptr target, const void *source, size_t size, CUstream stream)
{
    return known((void *)target) ? copy(stream, "copy to the GPU", (void *)target, source, size) : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemcpyDtoHAsync(void *target, CUdeviceptr source, size_t size, CUstream stream)
{
    return known((void *)source) ? copy(stream, "copy to the host", target, (void *)source, size) : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream)
{
    bool both = known((void *)target) && known((void *)source);
    return both ? copy(stream, "copy on the GPU", (void *)target, (void *)source, size) : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemcpy(CUdeviceptr target, CUdeviceptr source, size_t size) { TRY(safe(__func__)); return cuMemcpyAsync(target, source, size, NULL); }
CUresult cuMemcpyHtoD(CUdeviceptr target, const void *source, size_t size) { TRY(safe(__func__)); return cuMemcpyHtoDAsync(target, source, size, NULL); }
CUresult cuMemcpyDtoH(void *target, CUdeviceptr source, size_t size) { TRY(safe(__func__)); return cuMemcpyDtoHAsync(target, source, size, NULL); }
CUresult cuMemcpyDtoD(CUdeviceptr target, CUdeviceptr source, size_t size) { TRY(safe(__func__)); return cuMemcpyDtoDAsync(target, source, size, NULL); }
CUresult cuMemcpy2DAsync(const CUDA_MEMCPY2D *c, CUstream stream)
{
    char *target = c->dstMemoryType == CU_MEMORYTYPE_HOST ? c->dstHost : (char *)c->dstDevice;
    const char *source = c->srcMemoryType == CU_MEMORYTYPE_HOST ? c->srcHost : (const char *)c->srcDevice;
    struct CUgraphNode_st node = {.operation = COPY, .size = c->WidthInBytes, .rows = c->Height};
    node.target = target + c->dstY * c->dstPitch + c->dstXInBytes, node.pitch = c->dstPitch;
    node.source = source + c->srcY * c->srcPitch + c->srcXInBytes, node.source_pitch = c->srcPitch;
    return submit(stream, "2D copy", node);
}
CUresult cuMemcpy2DUnaligned(const CUDA_MEMCPY2D *c) { TRY(safe(__func__)); return cuMemcpy2DAsync(c, NULL); }
CUresult cuMemcpy2D(const CUDA_MEMCPY2D *c) { return cuMemcpy2DUnaligned(c); }

static CUresult set(CUstream stream, CUdeviceptr target, unsigned value, unsigned width, size_t count)
{
    if (!known((void *)target))
        return CUDA_ERROR_INVALID_VALUE;
    struct CUgraphNode_st node = {.operation = FILL, .target = (void *)target, .size = count * width, .value = value, .width = width};
    return submit(stream, "fill", node);
}
CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t count, CUstream stream) { return set(stream, target, value, 1, count); }
CUresult cuMemsetD16Async(CUdeviceptr target, unsigned short value, size_t count, CUstream stream) { return set(stream, target, value, 2, count); }
CUresult cuMemsetD32Async(CUdeviceptr target, unsigned value, size_t count, CUstream stream) { return set(stream, target, value, 4, count); }
CUresult cuMemsetD8(CUdeviceptr target, unsigned char value, size_t count) { TRY(safe(__func__)); return set(NULL, target, value, 1, count); }
CUresult cuMemsetD16(CUdeviceptr target, unsigned short value, size_t count) { TRY(safe(__func__)); return set(NULL, target, value, 2, count); }
CUresult cuMemsetD32(CUdeviceptr target, unsigned value, size_t count) { TRY(safe(__func__)); return set(NULL, target, value, 4, count); }
CUresult cuMemsetD2D8Async(CUdeviceptr target, size_t pitch, unsigned char value, size_t width, size_t height, CUstream stream)
{
    struct CUgraphNode_st node = {.operation = FILL, .target = (void *)target, .size = width, .pitch = pitch, .rows = height, .value = value, .width = 1};
    return submit(stream, "2D fill", node);
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address)
{
    LOCKED;
    struct block *block = find(DEVICE, (void *)address), *pinned = find(PINNED, (void *)address);
    if (!block && !pinned)
        return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)value = &primary; break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: *(unsigned *)value = block ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)value = address; break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER: *(void **)value = pinned ? (void *)address : NULL; break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(unsigned *)value = 0; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)value = 0; break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: *(cuuint64_t *)value = address; break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *(CUdeviceptr *)value = (CUdeviceptr)(block ? block : pinned)->start; break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *(size_t *)value = (block ? block : pinned)->size; break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
    }
    return OK;
}
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **values, CUdeviceptr address)
{
    for (unsigned i = 0; i < count; i++)
        if (cuPointerGetAttribute(values[i], attributes[i], address)) /* of memory that is not CUDA's: all zero */
            memset(values[i], 0, attributes[i] == CU_POINTER_ATTRIBUTE_MEMORY_TYPE || attributes[i] == CU_POINTER_ATTRIBUTE_IS_MANAGED ||
                                 attributes[i] == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL ? 4 : 8);
    return OK;
}

/* ---- modules and kernels --------------------------------------------------------------------------------------- */

struct CUmod_st { int unused; };
struct CUfunc_st { CUmodule module; int shared; char name[]; };

CUresult stub_module(CUmodule *module) { *module = calloc(1, sizeof **module); return OK; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { (void)image; TRY(safe(__func__)); return stub_module(module); }
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options, void **values)
{
    (void)count, (void)options, (void)values;
    return cuModuleLoadData(module, image);
}
CUresult cuModuleLoadFatBinary(CUmodule *module, const void *image) { return cuModuleLoadData(module, image); }
CUresult cuModuleUnload(CUmodule module) { (void)module; return safe(__func__); }
CUresult cuModuleGetLoadingMode(CUmoduleLoadingMode *mode) { *mode = CU_MODULE_LAZY_LOADING; return OK; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
    *function = calloc(1, sizeof **function + strlen(name) + 1);
    (*function)->module = module;
    strcpy((*function)->name, name);
    return OK;
}
CUresult cuModuleGetGlobal(CUdeviceptr *address, size_t *size, CUmodule module, const char *name)
{
    (void)module, (void)name;
    if (size) *size = 1 << 16;
    return address ? allocate(DEVICE, 1 << 16, (void **)address) : OK;
}
CUresult cuFuncGetModule(CUmodule *module, CUfunction function) { *module = function->module; return OK; }
CUresult cuFuncGetName(const char **name, CUfunction function) { *name = function->name; return OK; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function)
{
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 64; break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION: case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *value = 90; break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = function->shared ? function->shared : 49152; break;
    default: *value = 0;
    }
    return OK;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value)
{
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        if (value > 232448)
            return CUDA_ERROR_INVALID_VALUE;
        function->shared = value;
    }
    return OK;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { (void)function, (void)config; return OK; }
CUresult cuFuncSetSharedMemConfig(CUfunction function, CUsharedconfig config) { (void)function, (void)config; return OK; }

static CUresult launch(CUfunction function, CUstream stream)
{
    TRACE("kernel %s", function->name);
    return submit(stream, "kernel", (struct CUgraphNode_st){.operation = KERNEL, .source = function});
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream stream, void **arguments, void **extra)
{
    (void)arguments, (void)extra;
    bool fits = (uint64_t)bx * by * bz <= 1024 && gx && gy && gz && bx && by && bz && gy < 65536 && gz < 65536;
    return fits && shared <= 232448 ? launch(f, stream) : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **arguments, void **extra)
{
    return cuLaunchKernel(f, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes, c->hStream, arguments, extra);
}
CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream stream, void **arguments)
{
    return cuLaunchKernel(f, gx, gy, gz, bx, by, bz, shared, stream, arguments, NULL);
}
CUresult cuLaunchHostFunc(CUstream stream, CUhostFn call, void *data)
{
    return submit(stream, "host function", (struct CUgraphNode_st){.operation = HOST, .call = call, .source = data});
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction f, int threads, size_t shared)
{
    (void)f, (void)threads, (void)shared;
    *count = 2;
    return OK;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, CUfunction f, int threads, size_t shared, unsigned flags)
{
    (void)flags;
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(count, f, threads, shared);
}
CUresult cuOccupancyAvailableDynamicSMemPerBlock(size_t *size, CUfunction f, int blocks_, int threads) { (void)f, (void)blocks_, (void)threads; *size = 49152; return OK; }

/* ---- errors, profiler, and the way in -------------------------------------------------------------------------- */

CUresult cuProfilerStart(void) { return OK; }
CUresult cuProfilerStop(void) { return OK; }

static const struct { CUresult code; const char *name, *text; } ERRORS[] = {
#define E(name, text) {name, #name, text}
    E(CUDA_SUCCESS, "no error"),
    E(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    E(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    E(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    E(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    E(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    E(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    E(CUDA_ERROR_ILLEGAL_STATE, "the operation cannot be performed in the present state"),
    E(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    E(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    E(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    E(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"),
    E(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"),
    E(CUDA_ERROR_STREAM_CAPTURE_MERGE, "operation would result in a merge of separate capture sequences"),
    E(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "capture was not ended in the same stream as it began"),
    E(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "dependency created on uncaptured work in another stream"),
    E(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "operation would make the legacy stream depend on a capturing blocking stream"),
    E(CUDA_ERROR_CAPTURED_EVENT, "operation not permitted on an event last recorded in a capturing stream"),
    E(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "attempt to terminate a thread-local capture sequence from another thread"),
    E(CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE, "the graph update was not performed because it included changes which violated constraints"),
#undef E
};
static int error_index(CUresult code)
{
    for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (ERRORS[i].code == code)
            return (int)i;
    return -1;
}
CUresult cuGetErrorName(CUresult code, const char **name)
{
    int index = error_index(code);
    *name = index < 0 ? "CUDA_ERROR_UNKNOWN" : ERRORS[index].name;
    return OK;
}
CUresult cuGetErrorString(CUresult code, const char **text)
{
    int index = error_index(code);
    *text = index < 0 ? "unknown error" : ERRORS[index].text;
    return OK;
}

/* Which version of a function a caller of that age gets, where it is not simply the newest. */
static const struct { const char *name; int since; const char *symbol; } AGES[] = {
    {"cuStreamGetCaptureInfo", 12030, "cuStreamGetCaptureInfo_v3"},
    {"cuStreamGetCaptureInfo", 11030, "cuStreamGetCaptureInfo_v2"},
    {"cuStreamGetCaptureInfo", 0, "cuStreamGetCaptureInfo"},
    {"cuGraphInstantiate", 12000, "cuGraphInstantiateWithFlags"},
    {"cuGraphInstantiate", 0, "cuGraphInstantiate_v2"},
    {"cuStreamGetCtx", 12050, "cuStreamGetCtx_v2"},
    {"cuStreamGetCtx", 0, "cuStreamGetCtx"},
    {"cuEventElapsedTime", 12080, "cuEventElapsedTime_v2"},
    {"cuEventElapsedTime", 0, "cuEventElapsedTime"},
};

static void *lookup(const char *name, int version)
{
    char newer[128];
    for (size_t i = 0; i < sizeof AGES / sizeof *AGES; i++)
        if (!strcmp(AGES[i].name, name) && version >= AGES[i].since)
            return dlsym(RTLD_DEFAULT, AGES[i].symbol) ?: stub_own(AGES[i].symbol);
    for (int age = 4; age > 1; age--) {
        snprintf(newer, sizeof newer, "%s_v%d", name, age);
        void *found = stub_own(newer);
        if (found)
            return found;
    }
    return stub_own(name);
}

CUresult cuGetProcAddress_v2(const char *name, void **found, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *status)
{
    (void)flags; /* a default stream for each thread is the same here */
    *found = strcmp(name, "cuGetProcAddress") ? lookup(name, version)
             : version >= 12000 ? (void *)cuGetProcAddress_v2 : stub_own("cuGetProcAddress");
    if (!*found)
        *found = stub_unserved(name);
    if (status)
        *status = *found ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *found ? OK : CUDA_ERROR_NOT_FOUND;
}
#undef cuGetProcAddress
CUresult cuGetProcAddress(const char *name, void **found, int version, cuuint64_t flags)
{
    return cuGetProcAddress_v2(name, found, version, flags, NULL);
}
CUresult cuGetExportTable(const void **table, const CUuuid *id) { return stub_private_table(table, id); }
