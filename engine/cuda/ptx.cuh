/* ptx.cuh: every PTX instruction that kernels use, beside what it does on the host. Lanes and
 * registers are numbered as in the PTX manual (Parallel Thread Execution ISA, "Matrix Fragments for
 * mma.m16n8k16"): with g = lane / 4 and t = lane % 4,
 *
 *   A [16, 16]: a[0] = (g, 2t..), a[1] = (g + 8, 2t..), a[2] = (g, 2t + 8..), a[3] = (g + 8, 2t
 * + 8..) B [16, 8]:  b[0] = (2t.., g), b[1] = (2t + 8.., g) C [16, 8]:  c[0], c[1] = (g, 2t..),
 * c[2], c[3] = (g + 8, 2t..)
 *
 * each register of A and B holding two neighbours along k, the lower in its low half. */
#ifndef GRAFT_CUDA_PTX_CUH
#define GRAFT_CUDA_PTX_CUH

#include "engine/cuda/device.cuh"

#ifdef __CUDACC__

/* c += A·B in float, of bf16. All lanes of the warp together. */
__device__ __forceinline__ void mma_bf16(float c[4], const unsigned a[4], const unsigned b[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Four 8×8 matrices of 16-bit values from shared memory: lane i gives the address of row i % 8 of
 * matrix i / 8 (16 bytes, aligned) and gets, of each matrix, row lane / 4, columns 2·(lane % 4)..
 */
__device__ __forceinline__ void ldmatrix_x4(unsigned r[4], const void *shared_row)
{
    unsigned at = (unsigned)__cvta_generic_to_shared(shared_row);

    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

/* The same, each matrix transposed. */
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned r[4], const void *shared_row)
{
    unsigned at = (unsigned)__cvta_generic_to_shared(shared_row);

    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

/* 16 bytes from global to shared memory behind the thread's back; `there` false: zeros. */
__device__ __forceinline__ void copy_async_16(void *shared, const void *global, bool there = true)
{
    unsigned at = (unsigned)__cvta_generic_to_shared(shared), bytes = there ? 16 : 0;

    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(at), "l"(global),
                 "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void copy_commit()
{
    asm volatile("cp.async.commit_group;\n" ::: "memory");
}
/* Until no more than LEFT of the thread's groups are in flight; __syncthreads() shows them to the
 * others. */
template <int LEFT> __device__ __forceinline__ void copy_wait()
{
    asm volatile("cp.async.wait_group %0;\n" ::"n"(LEFT) : "memory");
}

/* Any function of three bits, bit by bit: `TABLE` is its value for a = 0xf0, b = 0xcc, c = 0xaa. */
template <int TABLE> __device__ __forceinline__ unsigned lop3(unsigned a, unsigned b, unsigned c)
{
    unsigned d;

    asm("lop3.b32 %0, %1, %2, %3, %4;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
    return d;
}

#else

static inline float ptx_half(unsigned pair, int high)
{
    return __uint_as_float(high ? pair & 0xffff0000u : pair << 16);
}

static inline void mma_bf16(float c[4], const unsigned a[4], const unsigned b[2])
{
    struct fragment {
        unsigned a[4], b[2];
    } mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    const char *all = shim_exchange(SHIM_SITE(false), WARP, &mine, sizeof mine);
    int g = shim_lane() / 4, t = shim_lane() % 4;

    for (int i = 0; i < 4; i++) {
        int column = 2 * t + i % 2;

        for (int k = 0; k < 16; k++) {
            const struct fragment *of_a =
                (const struct fragment *)(all + (g * 4 + k % 8 / 2) * SHIM_EXCHANGE);
            const struct fragment *of_b =
                (const struct fragment *)(all + (column * 4 + k % 8 / 2) * SHIM_EXCHANGE);

            c[i] += ptx_half(of_a->a[i / 2 + k / 8 * 2], k % 2) * ptx_half(of_b->b[k / 8], k % 2);
        }
    }
}

/* Each lane reads its row when it comes: what others wrote is there only behind a barrier. */
static inline void ptx_ldmatrix(unsigned r[4], const void *shared_row, bool transposed)
{
    const char *all = shim_exchange(SHIM_SITE(false), WARP, shared_row, 16);
    int g = shim_lane() / 4, t = shim_lane() % 4;

    for (int m = 0; m < 4; m++) {
        uint16_t half[2];

        for (int i = 0; i < 2; i++) {
            int row = transposed ? 2 * t + i : g, column = transposed ? g : 2 * t + i;

            memcpy(&half[i], all + (m * 8 + row) * SHIM_EXCHANGE + column * 2, sizeof half[i]);
        }
        r[m] = half[0] | (unsigned)half[1] << 16;
    }
}

static inline void ldmatrix_x4(unsigned r[4], const void *shared_row)
{
    ptx_ldmatrix(r, shared_row, false);
}
static inline void ldmatrix_x4_trans(unsigned r[4], const void *shared_row)
{
    ptx_ldmatrix(r, shared_row, true);
}

static inline void copy_async_16(void *shared, const void *global, bool there = true)
{
    shim_copy_async(shared, there ? global : nullptr, 16);
}
static inline void copy_commit()
{
    shim_copy_commit();
}
template <int LEFT> static inline void copy_wait()
{
    shim_copy_wait(LEFT);
}

template <int TABLE> static inline unsigned lop3(unsigned a, unsigned b, unsigned c)
{
    unsigned d = 0;

    for (int i = 0; i < 8; i++)
        if (TABLE >> i & 1)
            d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return d;
}

#endif
#endif
