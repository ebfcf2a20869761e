#include "server/ipc_wire.h"

#include <string.h>

void ipc_wire_put_u8(struct strbuf *out, uint8_t v)
{
    strbuf_add(out, &v, 1);
}

void ipc_wire_put_u32(struct strbuf *out, uint32_t v)
{
    unsigned char b[4];

    for (int i = 0; i < 4; i++)
        b[i] = (unsigned char)(v >> (8 * i));
    strbuf_add(out, b, sizeof b);
}

void ipc_wire_put_u64(struct strbuf *out, uint64_t v)
{
    unsigned char b[8];

    for (int i = 0; i < 8; i++)
        b[i] = (unsigned char)(v >> (8 * i));
    strbuf_add(out, b, sizeof b);
}

void ipc_wire_put_f64(struct strbuf *out, double v)
{
    uint64_t bits;

    memcpy(&bits, &v, sizeof bits);
    ipc_wire_put_u64(out, bits);
}

void ipc_wire_put_bytes(struct strbuf *out, const char *s, size_t len)
{
    if (len > UINT32_MAX) {
        out->failed = true;
        return;
    }
    ipc_wire_put_u32(out, (uint32_t)len);
    strbuf_add(out, s, len);
    strbuf_add(out, "", 1);
}

void ipc_wire_put_string(struct strbuf *out, const char *s)
{
    ipc_wire_put_bytes(out, s != NULL ? s : "", s != NULL ? strlen(s) : 0);
}

/* NULL when fewer than n bytes are left. */
static const unsigned char *take(struct ipc_wire_reader *r, size_t n)
{
    const unsigned char *p;

    if (r->failed || r->len - r->at < n) {
        r->failed = true;
        return NULL;
    }
    p = (const unsigned char *)r->data + r->at;
    r->at += n;
    return p;
}

uint8_t ipc_wire_u8(struct ipc_wire_reader *r)
{
    const unsigned char *p = take(r, 1);

    return p != NULL ? *p : 0;
}

uint32_t ipc_wire_u32(struct ipc_wire_reader *r)
{
    const unsigned char *p = take(r, 4);

    return p != NULL
               ? (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24
               : 0;
}

uint64_t ipc_wire_u64(struct ipc_wire_reader *r)
{
    uint64_t low = ipc_wire_u32(r);

    return low | (uint64_t)ipc_wire_u32(r) << 32;
}

double ipc_wire_f64(struct ipc_wire_reader *r)
{
    uint64_t bits = ipc_wire_u64(r);
    double v;

    memcpy(&v, &bits, sizeof v);
    return v;
}

const char *ipc_wire_bytes(struct ipc_wire_reader *r, size_t *len)
{
    size_t n = ipc_wire_u32(r);
    const unsigned char *p = take(r, n);
    const unsigned char *nul = take(r, 1);

    if (p == NULL || nul == NULL || *nul != '\0') {
        r->failed = true;
        *len = 0;
        return "";
    }
    *len = n;
    return (const char *)p;
}

const char *ipc_wire_string(struct ipc_wire_reader *r)
{
    size_t len;
    const char *s = ipc_wire_bytes(r, &len);

    if (memchr(s, '\0', len) != NULL) {
        r->failed = true;
        return "";
    }
    return s;
}

uint32_t ipc_wire_count(struct ipc_wire_reader *r, uint32_t max, size_t each)
{
    uint32_t n = ipc_wire_u32(r);

    if (n > max || (each > 0 && n > (r->len - r->at) / each))
        r->failed = true;
    return r->failed ? 0 : n;
}

bool ipc_wire_ended(const struct ipc_wire_reader *r)
{
    return !r->failed && r->at == r->len;
}
