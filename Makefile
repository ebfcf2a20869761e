# Graft: one front door. `make help` lists the targets.
#
#   make                  build/graft
#   make BUILD=DIR        the same in another folder; each set of flags has its own
#   make V=1              shows the commands
#   make SAN=address      with AddressSanitizer and UBSan; SAN=thread: TSan; SAN=fuzzer: libFuzzer (clang)
#
# A new .c or .h in the product's folders needs no line here. Code for one processor family carries
# function-level target attributes, so no file has flags of its own.

BUILD ?= build
V ?= 0
Q := $(if $(filter 0,$(V)),@,)
said = $(if $(filter 0,$(V)),@printf '  %-5s %s\n' $(1) $(2))
CC := $(if $(filter default,$(origin CC)),gcc,$(CC))
SAN ?=
# What a sanitizer says needs lines, not variables.
OPT ?= -O2 $(if $(SAN),-g1,-g)

# Targets that do not compile must work before the libraries are there.
PKGS := libmicrohttpd jansson libpq libcrypto libpcre2-8 zlib
PKG_CFLAGS := $(shell pkg-config --cflags $(PKGS) 2>/dev/null)
PKG_LIBS := $(shell pkg-config --libs $(PKGS) 2>/dev/null)

WARN := -Wall -Wextra -Werror -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith \
        -Wvla -Wformat=2 -Wno-unused-parameter
override CPPFLAGS += -I. -D_GNU_SOURCE
override CFLAGS += -std=c11 $(OPT) $(WARN) -fno-math-errno -ffp-contract=off -pthread $(PKG_CFLAGS)
override LDFLAGS += -Wl,--as-needed
LDLIBS := $(PKG_LIBS) -lopenblas -lm -ldl -pthread

SAN_FLAGS_address := -fsanitize=address,undefined -fno-sanitize-recover=undefined
SAN_FLAGS_thread := -fsanitize=thread
SAN_FLAGS_fuzzer := -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined
ifeq ($(findstring clang,$(CC)),)
# gcc 12 takes minutes to follow the variables of instrumented kernels.
SAN_FLAGS_address += -fno-var-tracking-assignments
endif
ifneq ($(SAN),)
ifeq ($(SAN_FLAGS_$(SAN)),)
$(error SAN=$(SAN) is not known: address, thread or fuzzer)
endif
override CFLAGS += $(SAN_FLAGS_$(SAN)) -fno-omit-frame-pointer
override LDFLAGS += $(filter -fsanitize%,$(SAN_FLAGS_$(SAN)))
# Instrumented, it is the compiler that takes long of what does not compute, not the program.
$(BUILD)/server/%.o $(BUILD)/storage/%.o $(BUILD)/tests/%.o: OPT := -O1 -g1
endif

QUICK_LINK := $(if $(shell command -v ld.gold 2>/dev/null),-fuse-ld=gold)

# Every .c below these folders is part of the product; main.c alone has main().
SRC := $(sort $(wildcard engine/base/*.c engine/*.c engine/cpu/*.c engine/codec/*.c storage/*.c server/*.c))
OBJ := $(SRC:%.c=$(BUILD)/%.o) $(BUILD)/storage/migrations_data.o
LIB_OBJ := $(filter-out $(BUILD)/server/main.o,$(OBJ))

# tests/unit/test_X.c is one cmocka program; the other files there are linked into each of them.
UNIT_SRC := $(sort $(wildcard tests/unit/test_*.c))
UNIT_BIN := $(UNIT_SRC:%.c=$(BUILD)/%)
UNIT_SUPPORT := $(filter-out $(UNIT_SRC),$(sort $(wildcard tests/unit/*.c)))
UNIT_SUPPORT_OBJ := $(UNIT_SUPPORT:%.c=$(BUILD)/%.o)

# tests/fuzz/fuzz_X.c has LLVMFuzzerTestOneInput, its corpus is tests/fuzz/corpus/X/. With SAN=fuzzer
# it becomes a libFuzzer program, else replay_main.c runs the files it is given, once each.
FUZZ_SRC := $(sort $(wildcard tests/fuzz/fuzz_*.c))
FUZZ_BIN := $(FUZZ_SRC:%.c=$(BUILD)/%)
ifeq ($(SAN),fuzzer)
FUZZ_MAIN := -fsanitize=fuzzer
else
FUZZ_MAIN := $(BUILD)/tests/fuzz/replay_main.o
endif

.PHONY: all help deps demo run test test-fault test-mixes test-memory test-orders test-docker bench bench-apply bench-codecs fuzz lint format unit unit-programs fuzz-programs clean FORCE
.SECONDARY:
.DELETE_ON_ERROR:

all: $(BUILD)/graft

$(BUILD)/graft: $(OBJ) $(BUILD)/sources
	$(call said,link,$@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $(OBJ) $(LDLIBS)

$(BUILD)/libgraft.a: $(LIB_OBJ) $(BUILD)/sources
	@rm -f $@
	$(Q)ar rcs $@ $(LIB_OBJ)

$(BUILD)/%.o: %.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(call said,cc,$<)
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -c -o $@ $<

# The migrations travel inside the binary.
MIGRATIONS := $(sort $(wildcard migrations/*.sql))
$(BUILD)/storage/migrations_data.c: migrations/embed.sh $(MIGRATIONS) $(BUILD)/sources
	@mkdir -p $(@D)
	$(call said,embed,migrations)
	$(Q)sh migrations/embed.sh $(MIGRATIONS) > $@
$(BUILD)/storage/migrations_data.o: $(BUILD)/storage/migrations_data.c storage/migrations_data.h $(BUILD)/flags
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) -c -o $@ $<

# Rebuild when the compiler or a flag changes, relink when a file comes or goes.
$(BUILD)/flags: FORCE
	@mkdir -p $(@D)
	@echo '$(CC) $(shell $(CC) -dumpfullversion -dumpversion 2>/dev/null) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) $(LDLIBS)' > $@.new
	@cmp -s $@ $@.new || cp $@.new $@
$(BUILD)/sources: FORCE
	@mkdir -p $(@D)
	@echo '$(SRC) $(UNIT_SUPPORT) $(MIGRATIONS)' > $@.new
	@cmp -s $@ $@.new || cp $@.new $@

# The archive lets the linker take just what a test uses. Ninety programs: a quicker linker, where there is one.
$(BUILD)/tests/unit/test_%: $(BUILD)/tests/unit/test_%.o $(UNIT_SUPPORT_OBJ) $(BUILD)/libgraft.a
	$(call said,link,$@)
	$(Q)$(CC) $(LDFLAGS) $(QUICK_LINK) -o $@ $(filter %.o %.a,$^) $(LDLIBS) -lcmocka

$(BUILD)/tests/fuzz/fuzz_%: $(BUILD)/tests/fuzz/fuzz_%.o $(filter %.o,$(FUZZ_MAIN)) $(BUILD)/libgraft.a
	$(call said,link,$@)
	$(Q)$(CC) $(LDFLAGS) $(QUICK_LINK) $(filter -f%,$(FUZZ_MAIN)) -o $@ $(filter %.o %.a,$^) $(LDLIBS)

include engine/cuda/cuda.mk tests/gpu/gpu.mk

unit-programs: $(UNIT_BIN)
fuzz-programs: $(FUZZ_BIN)

help: ## this list
	@echo 'make builds $(BUILD)/graft. Other targets:'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile engine/cuda/cuda.mk tests/gpu/gpu.mk | awk -F'|' '{ printf "%-20s%s\n", $$1, $$2 }'

demo: ## from nothing to an answering fine-tune: installs, builds, trains, asks (under 10 minutes)
	@tests/demo/demo.sh

run: ## serve on 127.0.0.1:8080 with the data in .cache/data or $GRAFT_DATA
	@tests/deps/install.sh build
	@$(MAKE) --no-print-directory -j"$$(nproc)" all
	@tests/demo/run.sh

test: ## every suite; SUITES="lint unit" picks some (tests/run --list)
	@tests/run $(SUITES)

test-fault: all ## kill -9 at 50 random points of a job's life (about 15 minutes)
	@tests/run fault-long

test-mixes: $(BUILD)/tests/unit/test_served ## 300 random mixes of tenants, codecs and lengths: each answer as alone (1 minute)
	@$< 300

test-memory: all ## a model of 2.7 GB compressed by processes that may have 1 GB (5 minutes, 12 GB of disk)
	@python3 tests/bench/memory.py --hidden 2048 --intermediate 8192 --limit 1024 --codecs bitdelta

test-orders: ## the CUDA kernels on the shim in 20 orders of their threads each, under the sanitizers (10 minutes)
	@tests/run orders

test-docker: all ## docker/: the images built by docker, or step by step in a scratch root (2 minutes)
	@tests/run docker docker-build

bench: all ## training speed on SmolLM2-135M, one JSON line
	@tests/demo/fetch_model.sh
	@$(BUILD)/graft bench train --model .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf \
	    --seq 512 --batch 2 --steps 5

bench-codecs: all ## each codec's KL, recall, time and memory on BASE, TUNED, CALIBRATION and HELD_OUT (hours)
	@python3 tests/bench/codecs.py --build '$(BUILD)' --base '$(BASE)' --tuned '$(TUNED)' \
	    --calibration '$(CALIBRATION)' --held-out '$(HELD_OUT)' \
	    $(foreach o,OTHER_TEXT REFERENCE PEERS PEER_DATA PEER_CODECS PYTHON NAME CODECS RATIOS SEEDS AS_IS THREADS,$(if $($o),--$(subst _,-,$(shell echo $o | tr A-Z a-z)) '$($o)'))

bench-apply: all ## what a row through each codec's delta costs on this CPU (10 minutes); MODEL: a step too
	@python3 tests/bench/apply.py --build '$(BUILD)' \
	    $(foreach o,MODEL CODECS RATIOS KERNELS SHAPES THREADS,$(if $($o),--$(shell echo $o | tr A-Z a-z) '$($o)'))

fuzz: ## each parser under libFuzzer for FUZZ_SECONDS (60); needs clang
	@FUZZ_SECONDS=$${FUZZ_SECONDS:-60} tests/run fuzz

lint: ## format, layers, links and the other rules of tests/lint
	@tests/run lint

format: ## clang-format over the whole tree
	@git ls-files -co --exclude-standard '*.c' '*.h' '*.cu' '*.cuh' '*.cpp' | xargs clang-format -i

deps: ## install the packages that the build, the demo and the tests need
	@tests/deps/install.sh all

unit: unit-programs ## the unit tests of this BUILD
	@set -e; for t in $(UNIT_BIN); do echo "== $$t"; $$t; done

clean: ## remove every build folder; .cache/ stays
	rm -rf build build-*

-include $(OBJ:.o=.d) $(UNIT_SRC:%.c=$(BUILD)/%.d) $(UNIT_SUPPORT:%.c=$(BUILD)/%.d) $(FUZZ_SRC:%.c=$(BUILD)/%.d)
