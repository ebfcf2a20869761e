/* ipc_wire.h: the fields inside a frame: integers little-endian, doubles as their 64 bits, strings
 * as a 32-bit length, the bytes, and a NUL that the length does not count (so a decoded string
 * needs no copy).
 *
 * Readers check every bound; the first failure sticks, yields zeros and "" from then on, and is
 * asked for once at the end. */
#ifndef GRAFT_IPC_WIRE_H
#define GRAFT_IPC_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/strbuf.h"

void ipc_wire_put_u8(struct strbuf *out, uint8_t v);
void ipc_wire_put_u32(struct strbuf *out, uint32_t v);
void ipc_wire_put_u64(struct strbuf *out, uint64_t v);
void ipc_wire_put_f64(struct strbuf *out, double v);
void ipc_wire_put_bytes(struct strbuf *out, const char *s, size_t len);
void ipc_wire_put_string(struct strbuf *out, const char *s);

struct ipc_wire_reader {
    const char *data;
    size_t len, at;
    bool failed;
};

uint8_t ipc_wire_u8(struct ipc_wire_reader *r);
uint32_t ipc_wire_u32(struct ipc_wire_reader *r);
uint64_t ipc_wire_u64(struct ipc_wire_reader *r);
double ipc_wire_f64(struct ipc_wire_reader *r);
const char *ipc_wire_bytes(struct ipc_wire_reader *r, size_t *len); /* may hold NULs */
const char *ipc_wire_string(struct ipc_wire_reader *r);             /* a NUL inside is a failure */
/* A count that the rest of the frame can hold at `each` bytes or more apiece, and at most `max`. */
uint32_t ipc_wire_count(struct ipc_wire_reader *r, uint32_t max, size_t each);
/* All read, nothing failed, nothing left. */
bool ipc_wire_ended(const struct ipc_wire_reader *r);

#endif
