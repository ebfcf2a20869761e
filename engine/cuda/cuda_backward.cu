/* The stages of a layer backward. Gradients of activations have the precision, those of parameters
 * are F32 and added; a gradient without data is not computed. */
#include "engine/cuda/cuda_norm.cuh"
#include "engine/cuda/vector.cuh"

#define THREADS 256

/* ------------------------------------------------------------------ products */

/* dx (+)= dy · W */
static void input_product(struct cuda *cuda, const struct linear &linear, const struct tensor &dy,
                          const struct tensor &dx, bool add)
{
    struct gemm g = gemm();

    g.m = (int32_t)dy.shape[0];
    g.n = (int32_t)linear.w.shape[1];
    g.k = (int32_t)linear.w.shape[0];
    g.dtype = g.c_dtype = cuda->activation;
    g.a = dy.data;
    g.b = linear.w.data;
    g.c = dx.data;
    g.lda = g.k;
    g.ldb = g.ldc = g.n;
    g.add = add;
    gemm_run(cuda->gemm, &g);
}

/* dW += dyᵀ · x, db += Σ dy */
static void parameter_gradients(struct cuda *cuda, const struct linear &grad,
                                const struct tensor &dy, const struct tensor &x)
{
    struct gemm g = gemm();

    cuda_bias_gradient(cuda, grad.b, dy);
    if (!grad.w.data)
        return;
    g.transpose_a = true;
    g.m = (int32_t)grad.w.shape[0];
    g.n = (int32_t)grad.w.shape[1];
    g.k = (int32_t)dy.shape[0];
    g.dtype = cuda->activation;
    g.c_dtype = DTYPE_F32;
    g.a = dy.data;
    g.b = x.data;
    g.c = grad.w.data;
    g.lda = g.m;
    g.ldb = g.ldc = g.n;
    g.add = true;
    gemm_run(cuda->gemm, &g);
}

/* ------------------------------------------------------------------ a stage's norm */

struct stage_norm {
    const struct tensor &x, &rstd, &weight, &n, &dn, &dx, &d_weight;
    float eps;
};

/* n = the norm of x once more: forward did not keep it. */
static void norm_again(struct cuda *cuda, const struct stage_norm &s)
{
    struct norm_call call = norm_call();

    call.x = s.x.data;
    call.n = s.n.data;
    call.weight = data_of<const float>(s.weight);
    call.count = (int32_t)s.x.shape[0];
    call.width = (int32_t)s.x.shape[1];
    call.eps = s.eps;
    cuda_norm(cuda, &call);
}

/* dx += the gradient through the norm. */
static void norm_back(struct cuda *cuda, const struct stage_norm &s)
{
    struct norm_backward call = norm_backward();

    call.x = s.x.data;
    call.weight = data_of<const float>(s.weight);
    call.dn = s.dn.data;
    call.dx = s.dx.data;
    call.rstd = data_of<float>(s.rstd);
    call.known = call.add = true;
    call.d_weight = data_of<float>(s.d_weight);
    call.count = (int32_t)s.x.shape[0];
    call.width = (int32_t)s.x.shape[1];
    cuda_norm_backward(cuda, &call);
}

/* ------------------------------------------------------------------ mlp */

/* gate and up become their gradients, act what forward had there. */
template <typename T, int WIDE>
static __global__ void silu_backward_kernel(T *gate, T *up, const T *d_act, T *act, int64_t count)
{
    int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * WIDE;
    float g[WIDE], u[WIDE], d[WIDE], a[WIDE];

    if (i >= count)
        return;
    load_wide<WIDE>(gate + i, g);
    load_wide<WIDE>(up + i, u);
    load_wide<WIDE>(d_act + i, d);
    UNROLL
    for (int k = 0; k < WIDE; k++) {
        float sigmoid = 1.0f / (1.0f + expf(-g[k])), silu = g[k] * sigmoid;

        a[k] = silu * u[k];
        g[k] = d[k] * u[k] * sigmoid * fmaf(g[k], 1.0f - sigmoid, 1.0f);
        u[k] = d[k] * silu;
    }
    store_wide<WIDE>(act + i, a);
    store_wide<WIDE>(gate + i, g);
    store_wide<WIDE>(up + i, u);
}

template <typename T, int WIDE>
static void silu_backward_of(struct cuda *cuda, const struct mlp_backward_args *a)
{
    int64_t count = a->gate.shape[0] * a->gate.shape[1];

    CUDA_LAUNCH(cuda->device, (silu_backward_kernel<T, WIDE>),
                (unsigned)ceil_div(count, THREADS * WIDE), THREADS, 0, data_of<T>(a->gate),
                data_of<T>(a->up), data_of<const T>(a->d_act), data_of<T>(a->act), count);
}

static void silu_backward(struct cuda *cuda, const struct mlp_backward_args *a)
{
    uintptr_t places = (uintptr_t)a->gate.data | (uintptr_t)a->up.data | (uintptr_t)a->d_act.data |
                       (uintptr_t)a->act.data;

    if (a->gate.shape[1] % 8 == 0 && places % 16 == 0)
        WITH_PRECISION(cuda, T, silu_backward_of<T, 8>(cuda, a));
    else
        WITH_PRECISION(cuda, T, silu_backward_of<T, 1>(cuda, a));
}

void cuda_mlp_backward(struct backend *backend, const struct mlp_backward_args *a)
{
    struct cuda *cuda = cuda_of(backend);
    const struct layer_weights *w = a->weights;
    const struct stage_norm norm = {
        a->x, a->rstd, w->mlp_norm, a->n, a->dn, a->dx, a->grads->mlp_norm, a->config->rms_norm_eps,
    };

    input_product(cuda, w->down, a->dx, a->d_act, false);
    silu_backward(cuda, a);
    norm_again(cuda, norm);
    input_product(cuda, w->gate, a->gate, a->dn, false);
    input_product(cuda, w->up, a->up, a->dn, true);
    parameter_gradients(cuda, a->grads->down, a->dx, a->act);
    parameter_gradients(cuda, a->grads->gate, a->gate, a->n);
    parameter_gradients(cuda, a->grads->up, a->up, a->n);
    norm_back(cuda, norm);
}

/* ------------------------------------------------------------------ attention's products */

void cuda_attn_out_backward(struct backend *backend, const struct attn_out_backward_args *a)
{
    struct cuda *cuda = cuda_of(backend);

    input_product(cuda, a->weights->o, a->dy, a->d_attn, false);
    parameter_gradients(cuda, a->grads->o, a->dy, a->attn);
}

static void heads_back(struct cuda *cuda, const struct attn_in_backward_args *a,
                       const struct tensor &raw, const struct tensor &weight,
                       const struct tensor &d, const struct tensor &d_weight)
{
    struct heads_backward call = heads_backward();

    call.d = d;
    call.rope = a->rope;
    call.eps = a->config->rms_norm_eps;
    if (a->config->qk_norm) {
        call.raw = raw;
        call.weight = weight;
        call.d_weight = d_weight;
    }
    cuda_heads_backward(cuda, &call);
}

void cuda_attn_in_backward(struct backend *backend, const struct attn_in_backward_args *a)
{
    struct cuda *cuda = cuda_of(backend);
    const struct layer_weights *w = a->weights;
    const struct stage_norm norm = {
        a->x,  a->rstd, w->attn_norm,        a->n,
        a->dn, a->dx,   a->grads->attn_norm, a->config->rms_norm_eps,
    };

    if (a->config->head_dim > CUDA_MAX_HEAD) {
        device_fail(cuda->device, ERR_INTERNAL, "attn_in_backward: heads of %d, %d at most",
                    a->config->head_dim, CUDA_MAX_HEAD);
        return;
    }
    heads_back(cuda, a, a->q_raw, w->q_norm, a->dq, a->grads->q_norm);
    heads_back(cuda, a, a->k_raw, w->k_norm, a->dk, a->grads->k_norm);
    norm_again(cuda, norm);
    input_product(cuda, w->q, a->dq, a->dn, false);
    input_product(cuda, w->k, a->dk, a->dn, true);
    input_product(cuda, w->v, a->dv, a->dn, true);
    parameter_gradients(cuda, a->grads->q, a->dq, a->n);
    parameter_gradients(cuda, a->grads->k, a->dk, a->n);
    parameter_gradients(cuda, a->grads->v, a->dv, a->n);
    norm_back(cuda, norm);
}
