#include "engine/cuda/gemm.h"

#include <cstdio>
#include <cstring>
#include <cublasLt.h>
#include <dlfcn.h>
#include <map>
#include <mutex>
#include <new>
#include <tuple>

#include "engine/cuda/device_state.h"

#define WORKSPACE_BYTES ((size_t)32 << 20) /* what NVIDIA advises for Hopper */

/* ------------------------------------------------------------------ the library */

/* Loaded at run time, so that nothing but this file needs it. */
struct lt {
    decltype(&cublasLtCreate) create;
    decltype(&cublasLtDestroy) destroy;
    decltype(&cublasLtMatmul) matmul;
    decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
    decltype(&cublasLtMatmulDescCreate) desc_create;
    decltype(&cublasLtMatmulDescDestroy) desc_destroy;
    decltype(&cublasLtMatmulDescSetAttribute) desc_set;
    decltype(&cublasLtMatrixLayoutCreate) layout_create;
    decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
    decltype(&cublasLtMatmulPreferenceCreate) preference_create;
    decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
    decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
    decltype(&cublasLtGetStatusString) status_string;
};

#define LT_TEXT_(x) #x
#define LT_TEXT(x) LT_TEXT_(x)
#define LT_FILE "libcublasLt.so." LT_TEXT(CUBLAS_VER_MAJOR)

/* Beside this shared object, then where the loader looks, then in the toolkit's usual folder. */
static void *open_library()
{
    char path[4096];
    const char *slash;
    Dl_info self;
    void *library = nullptr;

    if (dladdr((const void *)&open_library, &self) && (slash = strrchr(self.dli_fname, '/'))) {
        int folder = (int)(slash - self.dli_fname);

        snprintf(path, sizeof path, "%.*s/%s", folder, self.dli_fname, LT_FILE);
        library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    }
    if (!library)
        library = dlopen(LT_FILE, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        library = dlopen("/usr/local/cuda/lib64/" LT_FILE, RTLD_NOW | RTLD_LOCAL);
    return library;
}

template <typename F> static bool find(void *library, const char *name, F *function)
{
    *function = (F)dlsym(library, name);
    return *function != nullptr;
}

static bool find_all(void *l, struct lt *lt)
{
    return find(l, "cublasLtCreate", &lt->create) && find(l, "cublasLtDestroy", &lt->destroy) &&
           find(l, "cublasLtMatmul", &lt->matmul) &&
           find(l, "cublasLtMatmulAlgoGetHeuristic", &lt->heuristic) &&
           find(l, "cublasLtMatmulDescCreate", &lt->desc_create) &&
           find(l, "cublasLtMatmulDescDestroy", &lt->desc_destroy) &&
           find(l, "cublasLtMatmulDescSetAttribute", &lt->desc_set) &&
           find(l, "cublasLtMatrixLayoutCreate", &lt->layout_create) &&
           find(l, "cublasLtMatrixLayoutDestroy", &lt->layout_destroy) &&
           find(l, "cublasLtMatmulPreferenceCreate", &lt->preference_create) &&
           find(l, "cublasLtMatmulPreferenceDestroy", &lt->preference_destroy) &&
           find(l, "cublasLtMatmulPreferenceSetAttribute", &lt->preference_set) &&
           find(l, "cublasLtGetStatusString", &lt->status_string);
}

/* Once for the process; it stays. NULL: err says what is missing. */
static const struct lt *load(struct err *err)
{
    static std::mutex mutex;
    static struct lt lt;
    static void *library;
    static bool complete;
    std::lock_guard<std::mutex> lock(mutex);

    if (!library) {
        library = open_library();
        complete = library && find_all(library, &lt);
    }
    if (complete)
        return &lt;
    err_set(err, ERR_UNAVAILABLE,
            library
                ? "cuBLASLt is missing: " LT_FILE " is there and not complete: install cuBLAS %d"
                : "cuBLASLt is missing: " LT_FILE " is neither beside libgraft_cuda.so nor where "
                  "the system looks: run make CUDA=1 or install cuBLAS %d",
            CUBLAS_VER_MAJOR);
    return nullptr;
}

int gemm_available(struct err *err)
{
    return load(err) ? 0 : -1;
}

/* ------------------------------------------------------------------ plans */

/* What decides how a product is computed. */
struct gemm_shape {
    bool transpose_a, transpose_b, add;
    int32_t m, n, k;
    enum dtype dtype, c_dtype;
    int64_t lda, ldb, ldc;
    unsigned align_a, align_b, align_c; /* bytes, at most 256 */

    auto key() const
    {
        return std::tie(transpose_a, transpose_b, add, m, n, k, dtype, c_dtype, lda, ldb, ldc,
                        align_a, align_b, align_c);
    }
    bool operator<(const gemm_shape &other) const
    {
        return key() < other.key();
    }
};

struct gemm_plan {
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algo;
};

struct gemm_context {
    struct device *device;
    const struct lt *lt;
    cublasLtHandle_t handle;
    void *workspace;
    std::map<struct gemm_shape, struct gemm_plan> plans;
};

static bool refused(struct gemm_context *x, cublasStatus_t status, const struct gemm_shape *s)
{
    if (status == CUBLAS_STATUS_SUCCESS)
        return false;
    /* What the device itself did comes out of the runtime, which knows whether it is lost. */
    device_library_end(x->device, "gemm");
    if (device_failed(x->device))
        return true;
    device_fail(x->device,
                status == CUBLAS_STATUS_EXECUTION_FAILED || status == CUBLAS_STATUS_INTERNAL_ERROR
                    ? ERR_DEVICE
                : status == CUBLAS_STATUS_ALLOC_FAILED ? ERR_NO_MEMORY
                                                       : ERR_INTERNAL,
                "a product of %d x %d x %d in %s: cuBLASLt: %s", s->m, s->n, s->k,
                dtype_name(s->dtype), x->lt->status_string(status));
    return true;
}

static cudaDataType_t data_type(enum dtype dtype)
{
    return dtype == DTYPE_BF16 ? CUDA_R_16BF : CUDA_R_32F;
}

static void drop(const struct lt *lt, struct gemm_plan *p)
{
    if (p->c)
        lt->layout_destroy(p->c);
    if (p->b)
        lt->layout_destroy(p->b);
    if (p->a)
        lt->layout_destroy(p->a);
    if (p->desc)
        lt->desc_destroy(p->desc);
}

/* cuBLAS is column-major, where a row-major matrix is its own transpose. So it is asked for
 * Cᵀ [n, m] = op(B)ᵀ · op(A)ᵀ: B comes first. */
static cublasStatus_t describe(const struct lt *lt, const struct gemm_shape *s, struct gemm_plan *p)
{
    cublasOperation_t first = s->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t second = s->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    uint64_t n = (uint64_t)s->n, m = (uint64_t)s->m, k = (uint64_t)s->k;
    cublasStatus_t status = lt->desc_create(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);

    if (status == CUBLAS_STATUS_SUCCESS)
        status = lt->desc_set(p->desc, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = lt->desc_set(p->desc, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = lt->layout_create(&p->a, data_type(s->dtype), s->transpose_b ? k : n,
                                   s->transpose_b ? n : k, s->ldb);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = lt->layout_create(&p->b, data_type(s->dtype), s->transpose_a ? m : k,
                                   s->transpose_a ? k : m, s->lda);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = lt->layout_create(&p->c, data_type(s->c_dtype), n, m, s->ldc);
    return status;
}

/* The library's first choice, among those whose sums have one order: partial sums may be added up
 * in a workspace, never where the result lies. */
static cublasStatus_t choose(struct gemm_context *x, const struct gemm_shape *s,
                             struct gemm_plan *p)
{
    const struct lt *lt = x->lt;
    uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    uint32_t align_a = s->align_b, align_b = s->align_a, align_c = s->align_c;
    size_t workspace = WORKSPACE_BYTES;
    const struct {
        cublasLtMatmulPreferenceAttributes_t attribute;
        const void *value;
        size_t bytes;
    } set[] = {
        {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace},
        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction, sizeof reduction},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align_a, sizeof align_a},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align_b, sizeof align_b},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align_c, sizeof align_c},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align_c, sizeof align_c},
    };
    cublasLtMatmulPreference_t preference = nullptr;
    cublasLtMatmulHeuristicResult_t best = {};
    cublasStatus_t status = lt->preference_create(&preference);
    int found = 0;

    for (const auto &one : set)
        if (status == CUBLAS_STATUS_SUCCESS)
            status = lt->preference_set(preference, one.attribute, one.value, one.bytes);
    if (status == CUBLAS_STATUS_SUCCESS)
        status =
            lt->heuristic(x->handle, p->desc, p->a, p->b, p->c, p->c, preference, 1, &best, &found);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = found ? best.state : CUBLAS_STATUS_NOT_SUPPORTED;
    if (preference)
        lt->preference_destroy(preference);
    p->algo = best.algo;
    return status;
}

/* NULL after a failure. */
static const struct gemm_plan *plan_of(struct gemm_context *x, const struct gemm_shape *s)
{
    auto known = x->plans.find(*s);
    struct gemm_plan plan = {};
    cublasStatus_t status;

    if (known != x->plans.end())
        return &known->second;
    status = describe(x->lt, s, &plan);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = choose(x, s, &plan);
    if (refused(x, status, s)) {
        drop(x->lt, &plan);
        return nullptr;
    }
    return &x->plans.emplace(*s, plan).first->second;
}

/* ------------------------------------------------------------------ products */

static unsigned alignment(const void *pointer)
{
    uintptr_t at = (uintptr_t)pointer;
    unsigned bytes = 256;

    while (at % bytes)
        bytes /= 2;
    return bytes;
}

void gemm_run(struct gemm_context *x, const struct gemm *g)
{
    const float one = 1, beta = g->add ? 1.0f : 0.0f;
    struct gemm_shape s = {};
    const struct gemm_plan *plan;

    if (g->m == 0 || g->n == 0 || g->k == 0 || !device_library_begin(x->device))
        return;
    s.transpose_a = g->transpose_a;
    s.transpose_b = g->transpose_b;
    s.add = g->add;
    s.m = g->m;
    s.n = g->n;
    s.k = g->k;
    s.dtype = g->dtype;
    s.c_dtype = g->c_dtype;
    s.lda = g->lda;
    s.ldb = g->ldb;
    s.ldc = g->ldc;
    s.align_a = alignment(g->a);
    s.align_b = alignment(g->b);
    s.align_c = alignment(g->c);
    plan = plan_of(x, &s);
    if (plan)
        refused(x,
                x->lt->matmul(x->handle, plan->desc, &one, g->b, plan->a, g->a, plan->b, &beta,
                              g->c, plan->c, g->c, plan->c, &plan->algo, x->workspace,
                              WORKSPACE_BYTES, device_stream(x->device)),
                &s);
}

/* ------------------------------------------------------------------ open and close */

int gemm_open(struct gemm_context **out, struct device *device, struct err *err)
{
    const struct lt *lt = load(err);
    struct gemm_context *x;
    cublasStatus_t status;

    *out = nullptr;
    if (!lt)
        return -1;
    x = new (std::nothrow) struct gemm_context();
    if (!x)
        return err_set(err, ERR_NO_MEMORY, "no memory for products");
    x->device = device;
    x->lt = lt;
    device_use(device);
    status = lt->create(&x->handle);
    if (status != CUBLAS_STATUS_SUCCESS) {
        x->handle = nullptr;
        err_set(err, status == CUBLAS_STATUS_ALLOC_FAILED ? ERR_NO_MEMORY : ERR_UNAVAILABLE,
                "cuBLASLt does not start: %s", lt->status_string(status));
    } else {
        x->workspace = device_alloc(device, WORKSPACE_BYTES, err);
    }
    if (!x->workspace) {
        gemm_close(x);
        return -1;
    }
    *out = x;
    return 0;
}

void gemm_close(struct gemm_context *x)
{
    if (!x)
        return;
    for (auto &plan : x->plans)
        drop(x->lt, &plan.second);
    device_free(x->device, x->workspace);
    if (x->handle)
        x->lt->destroy(x->handle);
    delete x;
}
