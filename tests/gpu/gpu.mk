# On a machine with a GPU: the CUDA toolkit and a host compiler are enough. The tests of the CUDA
# backend are linked against libgraft_cuda.so instead of the shim, with a stand-in for cmocka and
# one for OpenBLAS, and without the parts of the engine that read files.
#
#   make check-gpu                 parity of every operation, training, decoding, compute-sanitizer
#   make bench-gpu                 speed, and what the device could do
#   make check-gpu GPU_LIB=shim    the same programs on the test shim, to know that they work

GPU_LIB ?= cuda
GPU_DIR := $(BUILD)/gpu-$(GPU_LIB)
GPU_SHARED := $(BUILD)/libgraft_$(GPU_LIB).so
GPU_C := engine/backend.c engine/backend_library.c engine/devices.c engine/tensor.c engine/delta_tensor.c engine/base_layout.c \
    $(addprefix engine/,model.c model_width.c model_pass.c model_train.c model_moments.c model_decode.c codec/calibration.c codec/stage.c) \
    $(filter-out engine/cpu/cpu_bench.c,$(sort $(wildcard engine/cpu/*.c))) \
    $(addprefix engine/base/,err.c log.c progress.c rng.c thread_pool.c utf8.c)
GPU_SUPPORT := tests/gpu/check.c tests/gpu/blas.c tests/unit/parity.c tests/unit/reference_model.c \
    $(if $(filter shim,$(GPU_LIB)),,tests/gpu/no_shim.c)
GPU_OBJ := $(GPU_C:%.c=$(GPU_DIR)/%.o) $(GPU_SUPPORT:%.c=$(GPU_DIR)/%.o)
# Those that test the shim itself have nothing to say of a GPU.
GPU_TESTS := $(filter-out test_cuda_shim test_cuda_devices,$(notdir $(basename $(wildcard tests/unit/test_cuda_*.c))))
GPU_PROGRAMS := $(GPU_TESTS:%=$(GPU_DIR)/tests/unit/%)
# The order of a GPU is not ours to choose: once through the shapes.
GPU_CPPFLAGS := -Itests/gpu -DSHIM_ORDERS=1

$(GPU_DIR)/%.o: %.c $(BUILD)/flags tests/gpu/gpu.mk
	@mkdir -p $(@D)
	$(call said,cc,$<)
	$(Q)$(CC) $(GPU_CPPFLAGS) $(CPPFLAGS) $(CFLAGS) -ffunction-sections -MMD -MP -c -o $@ $<

# What model.c would need to read a base file is not linked: nobody calls it here.
$(GPU_PROGRAMS): %: %.o $(GPU_OBJ) $(GPU_SHARED)
	$(call said,link,$@)
	$(Q)$(CC) $(LDFLAGS) -Wl,--gc-sections -o $@ $< $(GPU_OBJ) $(GPU_SHARED) -Wl,-rpath,$(abspath $(BUILD)) -lm -ldl -pthread

GPU_BENCH := $(GPU_DIR)/tests/bench/bench_gpu
GPU_BENCH_OBJ := $(patsubst %.c,$(GPU_DIR)/%.o,$(sort $(wildcard tests/bench/bench_gpu*.c)))
$(GPU_BENCH): $(GPU_BENCH_OBJ) $(GPU_OBJ) $(GPU_SHARED)
	$(call said,link,$@)
	$(Q)$(CC) $(LDFLAGS) -Wl,--gc-sections -o $@ $(GPU_BENCH_OBJ) $(GPU_OBJ) $(GPU_SHARED) -Wl,-rpath,$(abspath $(BUILD)) -lm -ldl -pthread

.PHONY: check-gpu gpu-programs bench-gpu
bench-gpu: $(GPU_BENCH) ## on a GPU: training and decoding at 0.5B to 8B beside what the device can do (8 minutes)
	@$(if $(filter shim,$(GPU_LIB)),BENCH_SHAPES=tiny )tests/bench/bench_gpu.sh $(GPU_BENCH)

gpu-programs: $(GPU_PROGRAMS) $(GPU_BENCH)
check-gpu: $(GPU_PROGRAMS) ## on a GPU: every kernel against the CPU, training, decoding, compute-sanitizer (8 minutes)
	@$(if $(filter shim,$(GPU_LIB)),CHECK_TOOLS= )tests/gpu/check_gpu.sh $(GPU_PROGRAMS)

-include $(GPU_OBJ:.o=.d) $(GPU_PROGRAMS:=.d) $(GPU_BENCH_OBJ:.o=.d)
