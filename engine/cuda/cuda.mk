# The CUDA backend: a shared object that the binary opens when it is asked for a CUDA device.
#
#   make CUDA=1         build/libgraft_cuda.so as well; needs nvcc (NVCC=path), and cuBLAS, of which
#                       engine/cuda/find_cublas.sh knows
#   make cuda-report    registers, shared memory and spills of each kernel
#   make test-cuda-shim the kernels on the test shim (a part of make test); needs g++ only
#
# The test shim is the same sources compiled by the host compiler: build/libgraft_shim.so.

CXX := $(if $(filter default,$(origin CXX)),$(if $(findstring clang,$(CC)),clang++,g++),$(CXX))
CUDA ?= 0
comma := ,
NVCC ?= nvcc

CUDA_SRC := $(sort $(wildcard engine/cuda/cuda_*.cu))
# What the shared objects need of the engine's C, compiled once more for them.
CUDA_C := engine/base/err.c engine/base/rng.c engine/base/utf8.c engine/tensor.c engine/delta_tensor.c
CUDA_HEADERS := $(wildcard engine/cuda/*.h engine/cuda/*.cuh)

# ------------------------------------------------------------------ for GPUs

CUDA_LIB := $(BUILD)/libgraft_cuda.so
CUDA_DEVICE_SRC := engine/cuda/device.cu engine/cuda/device_list.cu engine/cuda/gemm_lt.cu
CUDA_KERNEL_OBJ := $(CUDA_SRC:%.cu=$(BUILD)/cuda/%.o)
CUDA_OBJ := $(CUDA_KERNEL_OBJ) $(CUDA_DEVICE_SRC:%.cu=$(BUILD)/cuda/%.o)
CUDA_C_OBJ := $(CUDA_C:%.c=$(BUILD)/cuda/%.o)
# Machine code for Ampere and Hopper (and their relatives), PTX for what comes later.
CUDA_ARCH := -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a \
    -gencode arch=compute_90,code=compute_90
CUDA_NVCCFLAGS = -std=c++17 -O3 -lineinfo $(CUDA_ARCH) -Werror all-warnings -Xptxas -v \
    -Xcompiler -Wall,-Wextra,-Wno-unused-parameter,-fPIC,-fvisibility=hidden

ifeq ($(CUDA),1)
all: $(CUDA_LIB)
endif

# The driver's library is not linked: cudart opens it. Nor is cuBLASLt: gemm_lt.cu opens it, beside.
$(CUDA_LIB): $(CUDA_OBJ) $(CUDA_C_OBJ) $(BUILD)/cuda/cublas
	$(call said,link,$@)
	$(Q)$(NVCC) -shared -cudart static -Xlinker -soname,$(@F),--exclude-libs,ALL,--no-undefined -o $@ \
	    $(CUDA_OBJ) $(CUDA_C_OBJ) -lm -ldl -lpthread
	$(Q)ln -sf "$$(ls "$$(cat $(BUILD)/cuda/cublas)"/lib/libcublasLt.so.[0-9]* | head -n 1)" $(BUILD)/

$(BUILD)/cuda/cublas: engine/cuda/find_cublas.sh $(BUILD)/nvcc-flags
	@mkdir -p $(@D)
	$(Q)NVCC=$(NVCC) engine/cuda/find_cublas.sh > $@

# ptxas's words go to a file that cuda-report reads; a warning among them is an error.
$(BUILD)/cuda/engine/cuda/gemm_lt.o: $(BUILD)/cuda/cublas
$(BUILD)/cuda/engine/cuda/gemm_lt.o: CUBLAS = -isystem "$$(cat $(BUILD)/cuda/cublas)/include"
$(BUILD)/cuda/%.o: %.cu $(BUILD)/nvcc-flags
	@mkdir -p $(@D)
	$(call said,nvcc,$<)
	$(Q)$(NVCC) $(CPPFLAGS) $(CUBLAS) $(CUDA_NVCCFLAGS) -MMD -MP -MF $(@:.o=.d) -c -o $@ $< \
	    2> $(@:.o=.ptxas) && ! grep -i warning $(@:.o=.ptxas) >&2 || { cat $(@:.o=.ptxas) >&2; rm -f $@; exit 1; }
$(BUILD)/cuda/%.o: %.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(call said,cc,$<)
	$(Q)$(CC) $(CPPFLAGS) $(filter-out -I/usr%,$(CFLAGS)) -fPIC -fvisibility=hidden -MMD -MP -c -o $@ $<

$(BUILD)/nvcc-flags: FORCE
	@mkdir -p $(@D)
	@echo '$(CUDA_SRC) $(NVCC) $(CPPFLAGS) $(CUDA_NVCCFLAGS)' > $@.new
	@cmp -s $@ $@.new || cp $@.new $@

.PHONY: cuda-report
cuda-report: $(CUDA_KERNEL_OBJ) ## registers, shared memory and spills of each CUDA kernel; fails on a spill
	@engine/cuda/report.py $(CUDA_KERNEL_OBJ:.o=.ptxas)

# ------------------------------------------------------------------ the test shim

SHIM := $(BUILD)/libgraft_shim.so
SHIM_SRC := $(sort $(wildcard engine/cuda/shim/*.cpp))
SHIM_OBJ := $(CUDA_SRC:%.cu=$(BUILD)/shim/%.o) $(BUILD)/shim/engine/cuda/shim/self_test.o $(SHIM_SRC:%.cpp=$(BUILD)/shim/%.o) \
    $(CUDA_C:%.c=$(BUILD)/shim/%.o)
SHIM_FLAGS := -fPIC -fvisibility=hidden -ftls-model=initial-exec
CXX_WARN := -Wall -Wextra -Werror -Wpointer-arith -Wvla -Wformat=2 -Wno-unused-parameter
SHIM_CXXFLAGS = -std=c++17 $(OPT) $(CXX_WARN) -ffp-contract=off -pthread $(SHIM_FLAGS) \
    $(if $(SAN),$(SAN_FLAGS_$(SAN)) -fno-omit-frame-pointer)

$(SHIM): $(SHIM_OBJ) $(BUILD)/cuda-flags
	$(call said,link,$@)
	$(Q)$(CXX) $(LDFLAGS) -shared -Wl$(comma)-soname$(comma)$(@F) $(if $(SAN),,-Wl$(comma)--no-undefined) -o $@ $(SHIM_OBJ) -lopenblas -lm -pthread

$(BUILD)/shim/%.o: %.cu $(BUILD)/flags $(BUILD)/cuda-flags
	@mkdir -p $(@D)
	$(call said,c++,$<)
	$(Q)$(CXX) $(CPPFLAGS) $(SHIM_CXXFLAGS) -MMD -MP -x c++ -c -o $@ $<
$(BUILD)/shim/%.o: %.cpp $(BUILD)/flags $(BUILD)/cuda-flags
	@mkdir -p $(@D)
	$(call said,c++,$<)
	$(Q)$(CXX) $(CPPFLAGS) $(SHIM_CXXFLAGS) -MMD -MP -c -o $@ $<
$(BUILD)/shim/%.o: %.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(call said,cc,$<)
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) $(SHIM_FLAGS) -MMD -MP -c -o $@ $<

$(BUILD)/cuda-flags: FORCE
	@mkdir -p $(@D)
	@echo '$(CUDA_SRC) $(SHIM_SRC) $(CXX) $(SHIM_CXXFLAGS)' > $@.new
	@cmp -s $@ $@.new || cp $@.new $@

# Tests of the CUDA backend, tests/unit/test_cuda_*.c, are linked against the shim.
CUDA_TESTS := $(filter $(BUILD)/tests/unit/test_cuda_%,$(UNIT_BIN))
# So are one of the whole engine, which serves on both, and one of what runs out of memory.
SHIM_TESTS := $(CUDA_TESTS) $(BUILD)/tests/unit/test_served $(BUILD)/tests/unit/test_worker_memory
$(SHIM_TESTS): $(SHIM)
$(SHIM_TESTS): LDLIBS += $(SHIM) -Wl,-rpath,$(abspath $(BUILD))

.PHONY: shim test-cuda-shim
shim: $(SHIM) ## the test shim of a CUDA device, for --device shim:0

test-cuda-shim: $(CUDA_TESTS) ## parity of the CUDA kernels with the CPU's, on the test shim
	@rm -rf $(BUILD)/shim-counts && mkdir -p $(BUILD)/shim-counts
	@set -e; for t in $(CUDA_TESTS); do echo "== $$t"; GRAFT_SHIM_COUNTS=$(BUILD)/shim-counts $$t; done
	@tests/cuda/kernels.py $(BUILD)/shim-counts

.PHONY: test-cuda-barriers
test-cuda-barriers: $(CUDA_TESTS) ## leaves out each barrier of the CUDA kernels: some test must see it
	@tests/cuda/barriers.py $(CUDA_TESTS)

-include $(SHIM_OBJ:.o=.d) $(CUDA_OBJ:.o=.d) $(CUDA_C_OBJ:.o=.d)
