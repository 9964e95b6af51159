/* A CUDA driver without a GPU: a libcuda.so.1 for tests.

   The real cuda.core opens it like the driver and finds one GPU of compute capability 9.0.  Memory is the host's,
   copies copy, a stream keeps what it is given until somebody waits for it, a captured stream keeps it for its graph.
   There are no kernels: tests queue functions of their own (stub_enqueue).

   What this proves: that our calls exist in the real cuda.core, take these arguments in this order and are allowed in
   this state (a context is current, memory is alive and large enough, nothing forbidden happens during a capture,
   nothing is closed twice), and which calls of the driver they come down to.
   What it does not: any arithmetic of a kernel, any speed, and anything of TensorRT, whose own CUDA runtime accepts
   NVIDIA's driver alone.

   It is as strict as the driver or stricter: the host cannot read the addresses of GPU memory, memory that was freed is
   never given out again, fresh memory is filled with 0xFF, and the errors of a capture are those that CUDA documents
   ("Stream Management", cuStreamBeginCapture, "potentially unsafe" calls).

   Environment: STUB_TRACE=1 prints every call that changes something.  Functions named stub_... are for tests, by
   ctypes; see stub_gpu.py.  Build: build.py. */

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

#define OK CUDA_SUCCESS
#define LENGTH(array) (sizeof(array) / sizeof *(array))
#define TRY(call) do { CUresult tried = (call); if (tried != OK) return tried; } while (0)

/* ---- one lock around everything, and what tests look at -------------------------------------------------------- */

static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static void unlock(pthread_mutex_t **held) { pthread_mutex_unlock(*held); }
#define LOCKED __attribute__((cleanup(unlock))) pthread_mutex_t *held = (pthread_mutex_lock(&mutex), &mutex)

static struct { uint64_t waits, launches, kernels, recorded, device, pinned, events; } counts;
static double now;                           /* of the GPU's clock, in milliseconds: work moves it on */
static CUresult broken;                      /* an error that the driver does not recover from */
static size_t memory_size = 140ull << 30;    /* of the GPU */
static CUresult (*announced)(const char *);  /* called before anything is done; may make it fail */
static void (*dropped)(int);                 /* called for what no graph will call any more */

void stub_announce(CUresult (*called)(const char *what)) { announced = called; }
void stub_on_drop(void (*called)(int number)) { dropped = called; }
void stub_set_memory(size_t bytes) { memory_size = bytes; }
void stub_mend(void) { broken = OK; }

uint64_t stub_count(const char *what)
{
    const struct { const char *name; uint64_t count; } named[] = {
        {"waits", counts.waits},   {"launches", counts.launches}, {"kernels", counts.kernels},
        {"device", counts.device}, {"pinned", counts.pinned},     {"events", counts.events},
        {"recorded copies", counts.recorded}}; /* from the host or to it: done again by each launch */
    for (size_t i = 0; i < LENGTH(named); i++)
        if (!strcmp(named[i].name, what))
            return named[i].count;
    return UINT64_MAX;
}

__attribute__((format(printf, 1, 2))) static void trace(const char *format, ...)
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

/* ---- contexts: there is the primary one ------------------------------------------------------------------------ */

struct CUctx_st { int retained; unsigned flags; };
static struct CUctx_st primary;
static __thread CUcontext current;
static bool initialized;

static CUresult started(void) { return initialized ? OK : CUDA_ERROR_NOT_INITIALIZED; }
static CUresult exists(CUdevice device) { return !initialized ? started() : device ? CUDA_ERROR_INVALID_DEVICE : OK; }
static CUresult ready(void)
{
    return !initialized ? started() : broken ? broken : current ? OK : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuInit(unsigned flags)
{
    initialized = true;
    return flags ? CUDA_ERROR_INVALID_VALUE : OK;
}
CUresult cuDriverGetVersion(int *version) { *version = 13000; return OK; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return started(); }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = 0; return exists(ordinal); }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    LOCKED;
    primary.retained++;
    *context = &primary;
    return exists(device);
}
CUresult cuDevicePrimaryCtxRelease(CUdevice device)
{
    LOCKED;
    return primary.retained-- > 0 ? exists(device) : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active)
{
    *flags = primary.flags, *active = primary.retained > 0;
    return exists(device);
}
CUresult cuCtxSetCurrent(CUcontext context) { current = context; return started(); }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = current; return started(); }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return ready(); }
#undef cuCtxGetDevice_v2
CUresult cuCtxGetDevice_v2(CUdevice *device, CUcontext context) { (void)context; *device = 0; return started(); }
CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest)
{
    *least = 0, *greatest = -5;
    return ready();
}

/* ---- the device ------------------------------------------------------------------------------------------------ */

CUresult cuDeviceGetName(char *name, int length, CUdevice device)
{
    snprintf(name, length, "%s", "NVIDIA H200");
    return exists(device);
}
CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) { *bytes = memory_size; return exists(device); }
CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) { memset(uuid, 0x5a, sizeof *uuid); return exists(device); }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device)
{
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_INTEGRATED: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS: *value = 0; break;
    default: *value = 1; /* is supported */
    }
    return exists(device);
}

/* ---- memory ---------------------------------------------------------------------------------------------------- */

/* Three stretches of addresses.  DEVICE is what the GPU's memory is called: the host can neither read nor write there.
   What it holds lies in SHADOW, as far from the start.  PINNED is the host's and the GPU's alike.  Each address is used
   once, and there is a gap after each block. */
enum kind { DEVICE, PINNED, SHADOW };
static const size_t STRETCH = 8ull << 40, PAGE = 4096;

struct block { char *start; size_t size; bool live; };
static struct { char *start; size_t taken; struct block *blocks; size_t count, room; } stretches[3];
static size_t used; /* of the GPU's memory, in bytes */

__attribute__((constructor)) static void reserve(void)
{
    for (int kind = 0; kind < 3; kind++)
        stretches[kind].start = mmap(NULL, STRETCH, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static bool within(enum kind kind, const char *address)
{
    return address >= stretches[kind].start && address < stretches[kind].start + STRETCH;
}
static bool known(CUdeviceptr address) { return within(DEVICE, (void *)address) || within(PINNED, (void *)address); }
static char *backing(enum kind kind, char *address)
{
    return kind == DEVICE ? stretches[SHADOW].start + (address - stretches[DEVICE].start) : address;
}
static size_t pages(size_t size) { return (size + PAGE - 1) / PAGE * PAGE; }

static CUresult allocate(enum kind kind, size_t size, void **address)
{
    LOCKED;
    size_t place = stretches[kind].taken;
    char *start = stretches[kind].start + place, *memory = backing(kind, start);
    if (!size)
        return CUDA_ERROR_INVALID_VALUE;
    if ((kind == DEVICE && used + size > memory_size) || place + pages(size) + PAGE > STRETCH ||
        mprotect(memory, pages(size), PROT_READ | PROT_WRITE))
        return CUDA_ERROR_OUT_OF_MEMORY;
    memset(memory, 0xFF, size);
    stretches[kind].taken += pages(size) + PAGE;
    if (stretches[kind].count == stretches[kind].room) {
        stretches[kind].room = stretches[kind].room * 2 + 256;
        stretches[kind].blocks = realloc(stretches[kind].blocks, stretches[kind].room * sizeof(struct block));
    }
    stretches[kind].blocks[stretches[kind].count++] = (struct block){start, size, true};
    used += kind == DEVICE ? size : 0;
    *address = start;
    return OK;
}

/* The live block that `address` lies in, or NULL. */
static struct block *find(enum kind kind, const char *address)
{
    size_t low = 0, high = stretches[kind].count; /* blocks lie in the order of their addresses */
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (stretches[kind].blocks[middle].start <= address)
            low = middle + 1;
        else
            high = middle;
    }
    struct block *block = low ? &stretches[kind].blocks[low - 1] : NULL;
    return block && block->live && address < block->start + block->size ? block : NULL;
}

static CUresult release(enum kind kind, void *address)
{
    LOCKED;
    struct block *block = find(kind, address);
    if (!block || block->start != address)
        return CUDA_ERROR_INVALID_VALUE;
    block->live = false;
    used -= kind == DEVICE ? block->size : 0;
    madvise(backing(kind, address), pages(block->size), MADV_DONTNEED);
    mprotect(backing(kind, address), pages(block->size), PROT_NONE);
    return OK;
}

/* Where the bytes lie that `address` names; NULL if not in one live block.  Other addresses are the host's own. */
void *stub_bytes(char *address, size_t size)
{
    LOCKED;
    for (enum kind kind = DEVICE; kind <= PINNED; kind++) {
        struct block *block = find(kind, address);
        if (within(kind, address))
            return block && address + size <= block->start + block->size ? backing(kind, address) : NULL;
    }
    return within(SHADOW, address) ? NULL : address;
}

size_t stub_used(void) { return used; }
size_t stub_live(void)
{
    LOCKED;
    size_t live = 0;
    for (enum kind kind = DEVICE; kind <= PINNED; kind++)
        for (size_t i = 0; i < stretches[kind].count; i++)
            live += stretches[kind].blocks[i].live;
    return live;
}
/* For tests' libraries, which allocate in whatever state. */
void *stub_allocate(size_t size)
{
    void *address = NULL;
    allocate(DEVICE, size, &address);
    return address;
}
CUresult stub_release(void *address) { return release(DEVICE, address); }

/* ---- streams, captures, graphs --------------------------------------------------------------------------------- */

enum operation { COPY, FILL, FREE, ALLOCATION, GRAPH, CALL };
static const char *const NAMES[] = {"copy", "fill", "free", "allocation", "graph", "call"};

struct CUgraphNode_st {
    enum operation operation;
    char *target, *source;
    size_t size;
    unsigned value, width; /* of a fill: `width` bytes at a time */
    CUgraph graph;
    CUresult (*call)(int number); /* a test's function */
    int number;
};
struct CUgraph_st {
    CUgraphNode nodes;
    size_t count, room;
    CUuserObject kept;
    int holders; /* of an executable graph: itself, and each launch that is under way */
};
struct CUgraphExec_st { CUgraph graph; bool alive; };
struct capture {
    CUgraph graph;
    CUstream origin;
    CUstreamCaptureMode mode;
    pthread_t thread;
    bool invalid;
    uint64_t id;
};
struct CUstream_st {
    struct CUgraph_st work; /* all that was ever queued */
    size_t done;            /* of it */
    struct capture *capture;
    unsigned flags;
    int priority;
    bool alive, busy;
};
struct CUevent_st {
    CUstream stream;
    size_t position; /* in the stream's work */
    struct capture *capture;
    double at;
    unsigned flags;
    bool recorded, alive;
};

static struct CUstream_st ordinary = {.alive = true}; /* the default stream */
static CUstream streams[4096];
static int stream_count;
static struct capture *captures[16]; /* those under way */
static __thread CUstreamCaptureMode thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

static bool is_default(CUstream stream)
{
    return !stream || stream == CU_STREAM_LEGACY || stream == CU_STREAM_PER_THREAD;
}
static CUstream own(CUstream stream) { return is_default(stream) ? &ordinary : stream; }
static CUresult usable(CUstream stream)
{
    TRY(ready());
    return own(stream)->alive ? OK : CUDA_ERROR_INVALID_HANDLE;
}

/* For calls that may wait for a stream that is captured. */
static CUresult safe(const char *call)
{
    LOCKED;
    TRY(ready());
    for (size_t i = 0; i < LENGTH(captures); i++) {
        struct capture *capture = captures[i];
        CUstreamCaptureMode relaxed = CU_STREAM_CAPTURE_MODE_RELAXED;
        if (!capture || thread_mode == relaxed || capture->mode == relaxed)
            continue;
        bool ours = pthread_equal(capture->thread, pthread_self());
        bool others = capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL && thread_mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
        if (ours || others) {
            trace("%s during a capture", call);
            capture->invalid = true;
            return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        }
    }
    return OK;
}

/* Work in the legacy default stream waits for all streams that do not opt out; those must not be captured. */
static CUresult implicit(CUstream stream)
{
    for (size_t i = 0; i < LENGTH(captures); i++)
        if (captures[i] && own(stream) == &ordinary && !(captures[i]->origin->flags & CU_STREAM_NON_BLOCKING)) {
            captures[i]->invalid = true;
            return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
        }
    return OK;
}

static CUresult add(CUgraph graph, struct CUgraphNode_st node)
{
    if (graph->count == graph->room)
        graph->nodes = realloc(graph->nodes, (graph->room = graph->room * 2 + 16) * sizeof node);
    graph->nodes[graph->count++] = node;
    return OK;
}

static CUresult copy_or_fill(const struct CUgraphNode_st *node)
{
    LOCKED;
    char *target = stub_bytes(node->target, node->size);
    char *source = node->operation == COPY ? stub_bytes(node->source, node->size) : (char *)&node->value;
    if (!target || !source)
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    if (node->operation == COPY)
        memmove(target, source, node->size);
    else
        for (size_t i = 0; i < node->size; i += node->width)
            memcpy(target + i, source, node->width);
    return OK;
}

static CUresult run(struct CUgraphNode_st node);
static CUresult let_go(CUgraph graph);

static CUresult run_graph(CUgraph graph)
{
    CUresult result = OK;
    for (size_t i = 0; i < graph->count && result == OK; i++)
        result = run(graph->nodes[i]);
    let_go(graph);
    return result;
}

static CUresult run(struct CUgraphNode_st node)
{
    now += 0.005 + node.size / 1e9;
    if (announced && node.operation != CALL) /* which tests announce themselves */
        TRY(announced(NAMES[node.operation]));
    switch (node.operation) {
    case COPY: case FILL: return copy_or_fill(&node);
    case FREE: return release(DEVICE, node.target);
    case ALLOCATION: return OK;
    case CALL: counts.kernels++; return node.call(node.number);
    case GRAPH:
        return run_graph(node.graph);
    }
    return CUDA_ERROR_UNKNOWN;
}

/* Do what is queued in a stream up to `position`.  Nothing is locked meanwhile: a test's function may take its time. */
static CUresult finish(CUstream stream, size_t position, bool host_waits)
{
    static pthread_cond_t step = PTHREAD_COND_INITIALIZER;
    LOCKED;
    counts.waits += host_waits && stream->done < position;
    while (stream->done < position && !broken) {
        if (stream->busy) {
            pthread_cond_wait(&step, &mutex);
            continue;
        }
        struct CUgraphNode_st node = stream->work.nodes[stream->done];
        stream->busy = true;
        pthread_mutex_unlock(&mutex);
        CUresult result = run(node);
        pthread_mutex_lock(&mutex);
        stream->busy = false;
        stream->done++;
        bool passing = result == CUDA_ERROR_UNKNOWN || result == CUDA_ERROR_OUT_OF_MEMORY; /* as tests mean them */
        broken = passing ? OK : result;
        pthread_cond_broadcast(&step);
        TRY(result);
    }
    return broken;
}

/* Keep a piece of work for later: in the stream, or in the graph that is captured from it. */
static CUresult submit(CUstream stream, struct CUgraphNode_st node)
{
    LOCKED;
    TRY(usable(stream));
    TRY(implicit(stream));
    struct capture *capture = own(stream)->capture;
    trace("%s%s of %zu bytes", capture ? "captured " : "", NAMES[node.operation], node.size);
    if (capture && capture->invalid)
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    bool copy = node.operation == COPY;
    counts.recorded += capture && copy && (!find(DEVICE, node.source) || !find(DEVICE, node.target));
    return add(capture ? capture->graph : &own(stream)->work, node);
}

/* A test's function as a piece of work: `call(number)` when its turn comes.  Where it is captured, it may come often,
   until the graph is destroyed. */
CUresult stub_enqueue(CUstream stream, CUresult (*call)(int number), int number)
{
    return submit(stream, (struct CUgraphNode_st){.operation = CALL, .call = call, .number = number});
}
size_t stub_unfinished(void)
{
    size_t left = ordinary.work.count - ordinary.done;
    for (int i = 0; i < stream_count; i++)
        left += streams[i]->work.count - streams[i]->done;
    return left;
}
bool stub_is_alive(CUstream stream) { return stream->alive; }
bool stub_is_capturing(CUstream stream) { return stream->capture; }
int stub_streams(CUstream *made)
{
    memcpy(made, streams, stream_count * sizeof *streams);
    return stream_count;
}

CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority)
{
    LOCKED;
    TRY(ready());
    if (stream_count == LENGTH(streams))
        return CUDA_ERROR_OUT_OF_MEMORY;
    streams[stream_count++] = *stream = calloc(1, sizeof **stream);
    (*stream)->flags = flags, (*stream)->priority = priority, (*stream)->alive = true;
    return OK;
}
CUresult cuStreamCreate(CUstream *stream, unsigned flags) { return cuStreamCreateWithPriority(stream, flags, 0); }
CUresult cuStreamDestroy(CUstream stream)
{
    bool alive = stream->alive;
    stream->alive = false; /* but kept, so that later use is found out */
    return alive ? OK : CUDA_ERROR_INVALID_HANDLE;
}
/* A stream that is captured cannot be waited for; to try spoils the capture. */
static CUresult check_wait(CUstream stream)
{
    LOCKED;
    TRY(usable(stream));
    if (!own(stream)->capture)
        return implicit(stream);
    stream->capture->invalid = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}
CUresult cuStreamSynchronize(CUstream stream)
{
    TRY(check_wait(stream));
    trace("waits for a stream");
    return finish(own(stream), own(stream)->work.count, true);
}
CUresult cuStreamQuery(CUstream stream)
{
    TRY(check_wait(stream));
    TRY(safe(__func__));
    return own(stream)->done == own(stream)->work.count ? OK : CUDA_ERROR_NOT_READY;
}
CUresult cuCtxSynchronize(void)
{
    TRY(safe(__func__));
    for (int i = 0; i < stream_count; i++)
        TRY(finish(streams[i], streams[i]->work.count, true));
    return finish(&ordinary, ordinary.work.count, true);
}
CUresult cuStreamGetFlags(CUstream stream, unsigned *flags) { *flags = own(stream)->flags; return usable(stream); }
CUresult cuStreamGetPriority(CUstream stream, int *level) { *level = own(stream)->priority; return usable(stream); }
CUresult cuStreamGetId(CUstream stream, unsigned long long *id) { *id = (uintptr_t)stream; return usable(stream); }
CUresult cuStreamGetDevice(CUstream stream, CUdevice *device) { *device = 0; return usable(stream); }
#undef cuStreamGetCtx
CUresult cuStreamGetCtx(CUstream stream, CUcontext *context) { *context = &primary; return usable(stream); }
CUresult cuStreamGetCtx_v2(CUstream stream, CUcontext *context, CUgreenCtx *green)
{
    *green = NULL;
    return cuStreamGetCtx(stream, context);
}

CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode)
{
    static uint64_t ids;
    LOCKED;
    TRY(usable(stream));
    if (is_default(stream))
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    size_t place = 0;
    while (place < LENGTH(captures) && captures[place])
        place++;
    if (stream->capture || place == LENGTH(captures))
        return CUDA_ERROR_ILLEGAL_STATE;
    CUgraph graph = calloc(1, sizeof *graph);
    graph->holders = 1;
    captures[place] = stream->capture = malloc(sizeof *stream->capture);
    *stream->capture = (struct capture){graph, stream, mode, pthread_self(), false, ++ids};
    trace("capture begins, mode %d", mode);
    return OK;
}
CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph)
{
    LOCKED;
    TRY(usable(stream));
    struct capture *capture = own(stream)->capture;
    *graph = NULL;
    if (!capture)
        return CUDA_ERROR_ILLEGAL_STATE;
    if (capture->origin != stream)
        return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED && !pthread_equal(capture->thread, pthread_self()))
        return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    for (size_t i = 0; i < LENGTH(captures); i++)
        captures[i] = captures[i] == capture ? NULL : captures[i];
    for (int i = 0; i < stream_count; i++)
        streams[i]->capture = streams[i]->capture == capture ? NULL : streams[i]->capture;
    trace("capture ends with %zu nodes%s", capture->graph->count, capture->invalid ? ", invalid" : "");
    *graph = capture->invalid ? NULL : capture->graph;
    return capture->invalid ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : OK;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status)
{
    struct capture *capture = own(stream)->capture;
    *status = !capture           ? CU_STREAM_CAPTURE_STATUS_NONE
              : capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                 : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    return usable(stream);
}
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode)
{
    CUstreamCaptureMode before = thread_mode;
    thread_mode = *mode, *mode = before;
    return OK;
}
CUresult cuStreamGetCaptureInfo_v2(CUstream stream, CUstreamCaptureStatus *status, cuuint64_t *id, CUgraph *graph,
                                   const CUgraphNode **nodes, size_t *count)
{
    struct capture *capture = own(stream)->capture;
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = capture ? capture->graph : NULL;
    if (nodes) *nodes = NULL;
    if (count) *count = 0;
    return cuStreamIsCapturing(stream, status);
}
#undef cuStreamGetCaptureInfo_v3
CUresult cuStreamGetCaptureInfo_v3(CUstream stream, CUstreamCaptureStatus *status, cuuint64_t *id, CUgraph *graph,
                                   const CUgraphNode **nodes, const CUgraphEdgeData **edges, size_t *count)
{
    if (edges) *edges = NULL;
    return cuStreamGetCaptureInfo_v2(stream, status, id, graph, nodes, count);
}

/* What a graph keeps alive for its owner: one object is all that cuda.core gives it. */
struct CUuserObject_st { void *thing; CUhostFn destroy; int holders; };

CUresult cuUserObjectCreate(CUuserObject *object, void *thing, CUhostFn destroy, unsigned count, unsigned flags)
{
    *object = malloc(sizeof **object);
    **object = (struct CUuserObject_st){thing, destroy, count};
    return flags == CU_USER_OBJECT_NO_DESTRUCTOR_SYNC ? OK : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuUserObjectRelease(CUuserObject object, unsigned count)
{
    int left = __atomic_sub_fetch(&object->holders, count, __ATOMIC_SEQ_CST);
    if (left == 0)
        object->destroy(object->thing);
    return left < 0 ? CUDA_ERROR_INVALID_VALUE : OK;
}
CUresult cuGraphRetainUserObject(CUgraph graph, CUuserObject object, unsigned count, unsigned flags)
{
    if (graph->kept || count != 1)
        return CUDA_ERROR_NOT_SUPPORTED;
    graph->kept = object;
    object->holders += flags & CU_GRAPH_USER_OBJECT_MOVE ? 0 : 1;
    return OK;
}
CUresult cuGraphReleaseUserObject(CUgraph graph, CUuserObject object, unsigned count)
{
    if (graph->kept != object || count != 1)
        return CUDA_ERROR_INVALID_VALUE;
    graph->kept = NULL;
    return cuUserObjectRelease(object, 1);
}

CUresult cuGraphDestroy(CUgraph graph)
{
    if (graph->holders < 1)
        return CUDA_ERROR_INVALID_VALUE;
    return --graph->holders || !graph->kept ? OK : cuUserObjectRelease(graph->kept, 1);
}
static CUresult instantiate(CUgraphExec *made, CUgraph graph)
{
    LOCKED;
    if (graph->holders < 1)
        return CUDA_ERROR_INVALID_VALUE;
    *made = malloc(sizeof **made);
    **made = (struct CUgraphExec_st){calloc(1, sizeof *graph), true};
    for (size_t i = 0; i < graph->count; i++)
        add((*made)->graph, graph->nodes[i]);
    (*made)->graph->holders = 1, (*made)->graph->kept = graph->kept;
    if (graph->kept)
        graph->kept->holders++;
    trace("graph of %zu nodes instantiated", graph->count);
    return OK;
}
#undef cuGraphInstantiate
CUresult cuGraphInstantiateWithFlags(CUgraphExec *made, CUgraph graph, unsigned long long flags)
{
    (void)flags;
    return instantiate(made, graph);
}
CUresult cuGraphInstantiateWithParams(CUgraphExec *made, CUgraph graph, CUDA_GRAPH_INSTANTIATE_PARAMS *params)
{
    params->result_out = CUDA_GRAPH_INSTANTIATE_SUCCESS, params->hErrNode_out = NULL;
    return instantiate(made, graph);
}
/* The last holder of an executable graph drops what it keeps. */
static CUresult let_go(CUgraph graph)
{
    for (size_t i = 0; graph->holders == 1 && dropped && i < graph->count; i++)
        if (graph->nodes[i].operation == CALL)
            dropped(graph->nodes[i].number);
    return cuGraphDestroy(graph);
}
CUresult cuGraphExecDestroy(CUgraphExec made)
{
    if (!made || !made->alive)
        return CUDA_ERROR_INVALID_VALUE;
    made->alive = false;
    return let_go(made->graph);
}
CUresult cuGraphUpload(CUgraphExec made, CUstream stream)
{
    TRY(usable(stream));
    if (!made || !made->alive)
        return CUDA_ERROR_INVALID_VALUE;
    return own(stream)->capture ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : OK;
}
CUresult cuGraphLaunch(CUgraphExec made, CUstream stream)
{
    if (!made || !made->alive)
        return CUDA_ERROR_INVALID_VALUE;
    if (own(stream)->capture)
        return CUDA_ERROR_NOT_SUPPORTED; /* a child graph: nobody here needs one */
    TRY(submit(stream, (struct CUgraphNode_st){.operation = GRAPH, .graph = made->graph}));
    made->graph->holders++;
    counts.launches++;
    return OK;
}

/* ---- events ---------------------------------------------------------------------------------------------------- */

CUresult cuEventCreate(CUevent *event, unsigned flags)
{
    TRY(ready());
    *event = calloc(1, sizeof **event);
    (*event)->flags = flags, (*event)->alive = true;
    counts.events++;
    return OK;
}
CUresult cuEventDestroy(CUevent event)
{
    if (!event || !event->alive)
        return CUDA_ERROR_INVALID_HANDLE;
    event->alive = false; /* but kept, so that later use is found out */
    return OK;
}
CUresult cuEventRecord(CUevent event, CUstream stream)
{
    LOCKED;
    TRY(usable(stream));
    if (!event || !event->alive)
        return CUDA_ERROR_INVALID_HANDLE;
    event->stream = own(stream), event->position = own(stream)->work.count, event->capture = own(stream)->capture;
    event->at = now, event->recorded = true;
    return OK;
}
static CUresult check_event(CUevent event)
{
    LOCKED;
    TRY(ready());
    if (!event || !event->alive)
        return CUDA_ERROR_INVALID_HANDLE;
    if (event->capture)
        event->capture->invalid = true;
    return event->capture ? CUDA_ERROR_CAPTURED_EVENT : OK;
}
CUresult cuEventSynchronize(CUevent event)
{
    TRY(check_event(event));
    return event->recorded ? finish(event->stream, event->position, true) : OK;
}
CUresult cuEventQuery(CUevent event)
{
    TRY(check_event(event));
    TRY(safe(__func__));
    return !event->recorded || event->stream->done >= event->position ? OK : CUDA_ERROR_NOT_READY;
}
#undef cuEventElapsedTime
CUresult cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end)
{
    if (!start->recorded || !end->recorded || (start->flags | end->flags) & CU_EVENT_DISABLE_TIMING)
        return CUDA_ERROR_INVALID_HANDLE;
    *milliseconds = (float)(end->at - start->at);
    return OK;
}
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags)
{
    (void)flags;
    TRY(usable(stream));
    if (!event || !event->alive)
        return CUDA_ERROR_INVALID_HANDLE;
    struct capture *one = own(stream)->capture, *other = event->capture;
    if (other && is_default(stream))
        return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    if (one && one != other)
        return other ? CUDA_ERROR_STREAM_CAPTURE_MERGE : CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    stream->capture = other; /* joins the capture */
    return other || !event->recorded ? OK : finish(event->stream, event->position, false);
}

/* ---- memory: the calls ----------------------------------------------------------------------------------------- */

CUresult cuMemAlloc(CUdeviceptr *address, size_t size)
{
    TRY(safe(__func__));
    counts.device++;
    return allocate(DEVICE, size, (void **)address);
}
CUresult cuMemFree(CUdeviceptr address)
{
    TRY(safe(__func__));
    TRY(cuCtxSynchronize());
    return address ? release(DEVICE, (void *)address) : OK;
}
CUresult cuMemHostAlloc(void **address, size_t size, unsigned flags)
{
    (void)flags;
    TRY(safe(__func__));
    trace("pinned allocation of %zu bytes", size);
    counts.pinned++;
    return allocate(PINNED, size, address);
}
CUresult cuMemAllocHost(void **address, size_t size) { return cuMemHostAlloc(address, size, 0); }
CUresult cuMemFreeHost(void *address)
{
    TRY(safe(__func__));
    return release(PINNED, address);
}
CUresult cuMemGetInfo(size_t *left, size_t *total)
{
    *total = memory_size, *left = memory_size - used;
    return ready();
}

struct CUmemPoolHandle_st { bool alive; };
static struct CUmemPoolHandle_st default_pool = {true};
static CUresult open_pool(CUmemoryPool pool) { return pool && pool->alive ? OK : CUDA_ERROR_INVALID_VALUE; }

CUresult cuMemPoolCreate(CUmemoryPool *pool, const CUmemPoolProps *properties)
{
    TRY(ready());
    if (properties->allocType != CU_MEM_ALLOCATION_TYPE_PINNED)
        return CUDA_ERROR_INVALID_VALUE;
    *pool = malloc(sizeof **pool);
    (*pool)->alive = true;
    return OK;
}
CUresult cuMemPoolDestroy(CUmemoryPool pool)
{
    TRY(pool == &default_pool ? CUDA_ERROR_INVALID_VALUE : open_pool(pool));
    pool->alive = false;
    return OK;
}
CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice device)
{
    *pool = &default_pool;
    return exists(device);
}
CUresult cuDeviceGetMemPool(CUmemoryPool *pool, CUdevice device) { *pool = &default_pool; return exists(device); }
CUresult cuMemPoolSetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void *value)
{
    (void)attribute, (void)value;
    return open_pool(pool);
}
CUresult cuMemPoolGetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void *value)
{
    *(cuuint64_t *)value = attribute == CU_MEMPOOL_ATTR_USED_MEM_CURRENT ? used : 0;
    return open_pool(pool);
}
CUresult cuMemPoolSetAccess(CUmemoryPool pool, const CUmemAccessDesc *map, size_t count)
{
    (void)map, (void)count;
    return open_pool(pool);
}
CUresult cuMemPoolGetAccess(CUmemAccess_flags *flags, CUmemoryPool pool, CUmemLocation *location)
{
    (void)location;
    *flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    return open_pool(pool);
}
CUresult cuMemPoolTrimTo(CUmemoryPool pool, size_t keep) { (void)keep; return open_pool(pool); }
CUresult cuMemAllocFromPoolAsync(CUdeviceptr *address, size_t size, CUmemoryPool pool, CUstream stream)
{
    TRY(usable(stream));
    TRY(open_pool(pool));
    bool captured = own(stream)->capture;
    trace("%sallocation of %zu bytes", captured ? "captured " : "", size);
    if (used + size > memory_size && !captured) /* what is freed before, in the stream's order, is there to be used */
        TRY(finish(own(stream), own(stream)->work.count, false));
    TRY(allocate(DEVICE, size, (void **)address));
    counts.device++;
    return captured ? submit(stream, (struct CUgraphNode_st){.operation = ALLOCATION, .size = size}) : OK;
}
CUresult cuMemAllocAsync(CUdeviceptr *address, size_t size, CUstream stream)
{
    return cuMemAllocFromPoolAsync(address, size, &default_pool, stream);
}
CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream)
{
    return submit(stream, (struct CUgraphNode_st){.operation = FREE, .target = (void *)address});
}

CUresult cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream)
{
    struct CUgraphNode_st node = {.operation = COPY, .target = (void *)target, .source = (void *)source, .size = size};
    return submit(stream, node);
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr target, const void *source, size_t size, CUstream stream)
{
    return known(target) ? cuMemcpyAsync(target, (CUdeviceptr)source, size, stream) : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemcpyDtoHAsync(void *target, CUdeviceptr source, size_t size, CUstream stream)
{
    return known(source) ? cuMemcpyAsync((CUdeviceptr)target, source, size, stream) : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream)
{
    return known(target) && known(source) ? cuMemcpyAsync(target, source, size, stream) : CUDA_ERROR_INVALID_VALUE;
}
static CUresult set(CUstream stream, CUdeviceptr target, unsigned value, unsigned width, size_t count)
{
    struct CUgraphNode_st node = {.operation = FILL, .target = (void *)target, .size = count * width};
    node.value = value, node.width = width;
    return known(target) ? submit(stream, node) : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t count, CUstream stream)
{
    return set(stream, target, value, 1, count);
}
CUresult cuMemsetD16Async(CUdeviceptr target, unsigned short value, size_t count, CUstream stream)
{
    return set(stream, target, value, 2, count);
}
CUresult cuMemsetD32Async(CUdeviceptr target, unsigned value, size_t count, CUstream stream)
{
    return set(stream, target, value, 4, count);
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address)
{
    LOCKED;
    struct block *device = find(DEVICE, (void *)address), *pinned = find(PINNED, (void *)address);
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)value = device ? &primary : NULL; break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        *(unsigned *)value = device ? CU_MEMORYTYPE_DEVICE : pinned ? CU_MEMORYTYPE_HOST : 0;
        break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)value = device || pinned ? address : 0; break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER: *(CUdeviceptr *)value = pinned ? address : 0; break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(unsigned *)value = 0; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)value = device || pinned ? 0 : -2; break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
    }
    return device || pinned ? OK : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **values, CUdeviceptr address)
{
    for (unsigned i = 0; i < count; i++)
        if (cuPointerGetAttribute(values[i], attributes[i], address) == CUDA_ERROR_NOT_SUPPORTED)
            return CUDA_ERROR_NOT_SUPPORTED;
    return OK; /* for memory that is not CUDA's, too */
}

/* ---- errors, and the way in ------------------------------------------------------------------------------------ */

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
    E(CUDA_ERROR_NOT_READY, "device not ready"),
    E(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    E(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    E(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    E(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"),
    E(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"),
    E(CUDA_ERROR_STREAM_CAPTURE_MERGE, "operation would result in a merge of separate capture sequences"),
    E(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "capture was not ended in the same stream as it began"),
    E(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "dependency created on uncaptured work in another stream"),
    E(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "the legacy stream would depend on a capturing blocking stream"),
    E(CUDA_ERROR_CAPTURED_EVENT, "operation not permitted on an event last recorded in a capturing stream"),
    E(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "a thread-local capture was ended from another thread"),
#undef E
};
CUresult cuGetErrorName(CUresult code, const char **name)
{
    *name = "CUDA_ERROR_UNKNOWN";
    for (size_t i = 0; i < LENGTH(ERRORS); i++)
        if (ERRORS[i].code == code)
            *name = ERRORS[i].name;
    return OK;
}
CUresult cuGetErrorString(CUresult code, const char **text)
{
    *text = "unknown error";
    for (size_t i = 0; i < LENGTH(ERRORS); i++)
        if (ERRORS[i].code == code)
            *text = ERRORS[i].text;
    return OK;
}

/* Functions that are not here fail when they are called, and say so: callers look up many more than they need. */
static const char *missing[0x400];

static CUresult complain(int place)
{
    fprintf(stderr, "the stub driver has no %s\n", missing[place]);
    return CUDA_ERROR_NOT_SUPPORTED;
}

#define X4(m, n) m(n##0) m(n##1) m(n##2) m(n##3)
#define X16(m, n) X4(m, n) m(n##4) m(n##5) m(n##6) m(n##7) m(n##8) m(n##9) \
    m(n##a) m(n##b) m(n##c) m(n##d) m(n##e) m(n##f)
#define X64(m, n) X16(m, n##0) X16(m, n##1) X16(m, n##2) X16(m, n##3)
#define X256(m, n) X64(m, n) X16(m, n##4) X16(m, n##5) X16(m, n##6) X16(m, n##7) X16(m, n##8) X16(m, n##9) \
    X16(m, n##a) X16(m, n##b) X16(m, n##c) X16(m, n##d) X16(m, n##e) X16(m, n##f)
#define EACH(m) X256(m, 0x0) X256(m, 0x1) X256(m, 0x2) X256(m, 0x3)
#define DEFINE(n) static CUresult complain_##n(void) { return complain(n); }
#define NAME(n) complain_##n,
EACH(DEFINE)
static CUresult (*const COMPLAINTS[])(void) = {EACH(NAME)};

static void *complaint(const char *name)
{
    LOCKED;
    size_t place = 0;
    while (place < LENGTH(missing) - 1 && missing[place] && strcmp(missing[place], name))
        place++;
    if (!missing[place])
        missing[place] = strdup(name);
    return (void *)COMPLAINTS[place];
}

static void *exported(const char *symbol)
{
    static void *self;
    Dl_info info;
    if (!self && dladdr((void *)exported, &info))
        self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    return self ? dlsym(self, symbol) : NULL;
}

/* Which version of a function a caller of that age gets, where it is not simply the newest. */
static void *lookup(const char *name, int version)
{
    static const struct { const char *name; int since; const char *symbol; } AGES[] = {
        {"cuStreamGetCaptureInfo", 12030, "cuStreamGetCaptureInfo_v3"},
        {"cuStreamGetCaptureInfo", 0, "cuStreamGetCaptureInfo_v2"},
        {"cuStreamGetCtx", 12050, "cuStreamGetCtx_v2"},
        {"cuStreamGetCtx", 0, "cuStreamGetCtx"},
        {"cuGraphInstantiate", 0, "cuGraphInstantiateWithFlags"},
    };
    for (size_t i = 0; i < LENGTH(AGES); i++)
        if (!strcmp(AGES[i].name, name) && version >= AGES[i].since)
            return exported(AGES[i].symbol);
    char newer[128];
    for (int age = 4; age > 1; age--) {
        snprintf(newer, sizeof newer, "%s_v%d", name, age);
        void *found = exported(newer);
        if (found)
            return found;
    }
    void *found = exported(name);
    return found ? found : complaint(name);
}

CUresult cuGetProcAddress_v2(const char *name, void **found, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *status)
{
    (void)flags; /* a default stream for each thread is the same here */
    *found = lookup(name, version);
    if (status)
        *status = CU_GET_PROC_ADDRESS_SUCCESS;
    return OK;
}
