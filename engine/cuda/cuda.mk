# The CUDA backend: a shared object that the binary opens when it is asked for a CUDA device.
#
#   make CUDA=1         build/libgraft_cuda.so as well; needs nvcc
#   make test-cuda-shim the kernels on the test shim (a part of make test); needs g++ only
#
# The test shim is the same sources compiled by the host compiler: build/libgraft_shim.so.

CXX := $(if $(filter default,$(origin CXX)),$(if $(findstring clang,$(CC)),clang++,g++),$(CXX))
CUDA ?= 0
comma := ,
NVCC ?= nvcc

CUDA_SRC := $(sort $(wildcard engine/cuda/cuda_*.cu))
# What the shared objects need of the engine's C, compiled once more for them.
CUDA_C := engine/base/err.c engine/base/utf8.c engine/tensor.c
CUDA_HEADERS := $(wildcard engine/cuda/*.h engine/cuda/*.cuh)

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
$(CUDA_TESTS): $(SHIM)
$(CUDA_TESTS): LDLIBS += $(SHIM) -Wl,-rpath,$(abspath $(BUILD))

.PHONY: shim test-cuda-shim
shim: $(SHIM) ## the test shim of a CUDA device, for --device shim:0

test-cuda-shim: $(CUDA_TESTS) ## parity of the CUDA kernels with the CPU's, on the test shim
	@set -e; for t in $(CUDA_TESTS); do echo "== $$t"; $$t; done

-include $(SHIM_OBJ:.o=.d)
