/* launch_list.h: launches that are held back, to go to the device together: decoding makes hundreds
 * of small ones, the same each step, and a CUDA graph of them costs the host one.
 *
 * A list holds each launch with a copy of its parameters. The cache keeps the lists of recent
 * passes; one that comes again, launch by launch and byte by byte, is worth a graph. (Bytes between
 * a structure's members may differ without need: that costs a graph, nothing else.)
 *
 * Shared by device.cu and shim/device.cpp; one thread. */
#ifndef GRAFT_CUDA_LAUNCH_LIST_H
#define GRAFT_CUDA_LAUNCH_LIST_H

#include <cstdint>
#include <cstring>
#include <vector>

#include "engine/cuda/device.h"

#define LAUNCH_LISTS 8

struct held_launch {
    struct device_call call;
    dim3 grid, block;
    size_t shared, at; /* of the parameters, in the list's memory */
};

struct launch_list {
    std::vector<struct held_launch> launch;
    std::vector<char> memory;

    void clear()
    {
        launch.clear();
        memory.clear();
    }

    void add(const struct device_call &call, dim3 grid, dim3 block, size_t shared)
    {
        size_t at = (memory.size() + 15) / 16 * 16;
        struct held_launch held = {call, grid, block, shared, at};

        memory.resize(at + call.bytes); /* what is between is zero */
        memcpy(memory.data() + at, call.parameters, call.bytes);
        held.call.parameters = nullptr;
        launch.push_back(held);
    }

    /* Valid until the list changes. */
    struct device_call call_of(size_t i)
    {
        struct device_call call = launch[i].call;

        call.parameters = memory.data() + launch[i].at;
        return call;
    }

    bool is(const struct launch_list &other) const
    {
        if (launch.size() != other.launch.size() || memory != other.memory)
            return false;
        for (size_t i = 0; i < launch.size(); i++) {
            const struct held_launch &a = launch[i], &b = other.launch[i];

            if (a.call.kernel != b.call.kernel || memcmp(&a.grid, &b.grid, sizeof a.grid) != 0 ||
                memcmp(&a.block, &b.block, sizeof a.block) != 0 || a.shared != b.shared)
                return false;
        }
        return true;
    }
};

/* What a list has become: GRAPH is the device's own. */
template <typename GRAPH> struct launch_cache {
    struct kept {
        struct launch_list list;
        GRAPH graph;
        uint64_t used; /* the pass that had it last; 0: never */
    };
    struct kept entry[LAUNCH_LISTS] = {};
    uint64_t passes = 0;

    /* The entry of this list; *again: it was there. Else it takes the place of the one that was not
     * used for longest, whose graph `drop` is told of. */
    template <typename DROP>
    struct kept *find(const struct launch_list &list, bool *again, DROP drop)
    {
        struct kept *oldest = &entry[0];

        passes++;
        *again = true;
        for (struct kept &e : entry) {
            if (e.used && e.list.is(list)) {
                e.used = passes;
                return &e;
            }
            if (e.used < oldest->used)
                oldest = &e;
        }
        *again = false;
        drop(oldest->graph);
        oldest->list = list;
        oldest->graph = GRAPH();
        oldest->used = passes;
        return oldest;
    }
};

#endif
