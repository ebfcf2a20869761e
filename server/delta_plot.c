#include "server/delta_plot.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/file_io.h"
#include "engine/base/strbuf.h"

#define LEFT 70
#define WIDTH 860
#define HEIGHT 190 /* of one chart */
#define GAP 60

/* Matrices of a block by the part of their name that tells them apart. */
static const struct {
    const char *part, *colour;
} kinds[] = {
    {"q_proj", "#1f77b4"},    {"k_proj", "#17becf"},    {"v_proj", "#2ca02c"},
    {"o_proj", "#bcbd22"},    {"gate_proj", "#ff7f0e"}, {"up_proj", "#d62728"},
    {"down_proj", "#9467bd"},
};
#define KINDS (sizeof kinds / sizeof kinds[0])

struct bar {
    size_t kind; /* KINDS: none of them */
    double bytes, error;
};

#define POINTS 32

struct point {
    double bytes, kl;
};

struct curves {
    struct point predicted[POINTS], tried[POINTS], own; /* own: of the file itself */
    size_t predicted_count, tried_count, own_count;
};

static size_t kind_of(const char *name)
{
    size_t k = 0;

    while (k < KINDS && strstr(name, kinds[k].part) == NULL)
        k++;
    return k;
}

static double largest(const struct bar *bar, size_t count, bool bytes)
{
    double most = 0;

    for (size_t i = 0; i < count; i++)
        most = fmax(most, bytes ? bar[i].bytes : bar[i].error);
    return most > 0 ? most : 1;
}

static void chart(struct strbuf *sb, const struct bar *bar, size_t count, bool bytes, double top)
{
    double most = largest(bar, count, bytes), step = WIDTH / (double)count;

    strbuf_addf(sb, "<text x=\"%d\" y=\"%g\">%s</text>\n", LEFT, top - 8,
                bytes ? "kB of each matrix" : "relative error of each matrix");
    for (int i = 0; i <= 2; i++) {
        double y = top + HEIGHT - HEIGHT * i / 2.0;

        strbuf_addf(sb,
                    "<path d=\"M%d %gH%d\" stroke=\"#ddd\"/><text x=\"%d\" y=\"%g\" "
                    "text-anchor=\"end\">%.3g</text>\n",
                    LEFT, y, LEFT + WIDTH, LEFT - 6, y + 4, most * i / 2.0 / (bytes ? 1000 : 1));
    }
    for (size_t i = 0; i < count; i++) {
        double height = HEIGHT * (bytes ? bar[i].bytes : bar[i].error) / most;

        strbuf_addf(sb,
                    "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" fill=\"%s\"/>\n",
                    LEFT + step * (double)i, top + HEIGHT - height, step * 0.85, height,
                    bar[i].kind < KINDS ? kinds[bar[i].kind].colour : "#777");
    }
}

static void legend(struct strbuf *sb, double y)
{
    for (size_t k = 0; k < KINDS; k++)
        strbuf_addf(sb,
                    "<rect x=\"%g\" y=\"%g\" width=\"12\" height=\"12\" fill=\"%s\"/>"
                    "<text x=\"%g\" y=\"%g\">%s</text>\n",
                    LEFT + 120.0 * (double)k, y, kinds[k].colour, LEFT + 16 + 120.0 * (double)k,
                    y + 11, kinds[k].part);
}

/* ------------------------------------------------------------------ KL over bytes */

/* What is not above 0 has no place on these axes and is left out. */
static size_t read_points(const json_t *pairs, struct point *point, size_t room)
{
    size_t count = 0;

    for (size_t i = 0; i < json_array_size(pairs) && count < room; i++) {
        const json_t *pair = json_array_get(pairs, i);
        struct point p = {json_number_value(json_array_get(pair, 0)),
                          json_number_value(json_array_get(pair, 1))};

        if (p.bytes >= 1 && p.bytes < 1e18 && p.kl > 1e-12 && p.kl < 1e6)
            point[count++] = p;
    }
    return count;
}

static void read_curves(const json_t *report, struct curves *c)
{
    json_t *own = json_pack("[[O?, O?]]", json_object_get(report, "bytes"),
                            json_object_get(report, "measured_kl"));

    c->predicted_count = read_points(json_object_get(report, "predicted"), c->predicted, POINTS);
    c->tried_count = read_points(json_object_get(report, "tried"), c->tried, POINTS);
    c->own_count = read_points(own, &c->own, 1);
    json_decref(own);
}

/* Both axes are logarithmic: from `low` to `high` over `length`. */
struct axis {
    double low, high, at, length;
};

static double place(const struct axis *a, double value)
{
    return a->at + a->length * log(value / a->low) / log(a->high / a->low);
}

static void widen(struct axis *x, struct axis *y, const struct point *p, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        x->low = fmin(x->low, p[i].bytes / 1.2);
        x->high = fmax(x->high, p[i].bytes * 1.2);
        y->low = fmin(y->low, pow(10, floor(log10(p[i].kl))));
        y->high = fmax(y->high, pow(10, floor(log10(p[i].kl)) + 1));
    }
}

static void add_marks(struct strbuf *sb, const struct axis *x, const struct axis *y,
                      const struct point *p, size_t count, const char *look)
{
    for (size_t i = 0; i < count; i++)
        strbuf_addf(sb, "<circle cx=\"%.2f\" cy=\"%.2f\" %s/>\n", place(x, p[i].bytes),
                    place(y, p[i].kl), look);
}

static void add_grid(struct strbuf *sb, const struct axis *x, const struct axis *y, double top)
{
    for (double kl = y->low; kl < y->high * 1.5; kl *= 10)
        strbuf_addf(sb,
                    "<path d=\"M%d %.2fH%d\" stroke=\"#ddd\"/><text x=\"%d\" y=\"%.2f\" "
                    "text-anchor=\"end\">%.0e</text>\n",
                    LEFT, place(y, kl), LEFT + WIDTH, LEFT - 6, place(y, kl) + 4, kl);
    for (double decade = pow(10, floor(log10(x->low))); decade < x->high; decade *= 10)
        for (int k = 1; k < 10; k += k == 1 ? 1 : k == 2 ? 3 : 5) { /* 1, 2, 5 */
            double bytes = decade * k;

            if (bytes >= x->low && bytes <= x->high)
                strbuf_addf(sb,
                            "<path d=\"M%.2f %gV%g\" stroke=\"#ddd\"/><text x=\"%.2f\" "
                            "y=\"%g\" text-anchor=\"middle\">%g</text>\n",
                            place(x, bytes), top, top + HEIGHT, place(x, bytes), top + HEIGHT + 16,
                            bytes / 1000);
        }
}

/* What the file costs, what others cost that were tried, and what was expected of more. */
static void kl_chart(struct strbuf *sb, const struct curves *c, double top)
{
    struct axis x = {INFINITY, 0, LEFT, WIDTH}, y = {INFINITY, 0, top + HEIGHT, -HEIGHT};

    strbuf_addf(sb, "<text x=\"%d\" y=\"%g\">", LEFT, top - 8);
    if (c->predicted_count + c->tried_count + c->own_count == 0) {
        strbuf_addf(sb, "KL over the file's size: no rows were given to weigh or measure it on"
                        "</text>\n");
        return;
    }
    strbuf_addf(sb,
                "KL, nats a token, over the file's size in kB: measured of this file (full), of "
                "others that were tried (hollow), predicted without distillation (line)"
                "</text>\n");
    widen(&x, &y, c->predicted, c->predicted_count);
    widen(&x, &y, c->tried, c->tried_count);
    widen(&x, &y, &c->own, c->own_count);
    add_grid(sb, &x, &y, top);
    for (size_t i = 0; i < c->predicted_count; i++)
        strbuf_addf(sb, "%s%.2f %.2f", i == 0 ? "<path d=\"M" : "L",
                    place(&x, c->predicted[i].bytes), place(&y, c->predicted[i].kl));
    if (c->predicted_count > 0)
        strbuf_addf(sb, "\" fill=\"none\" stroke=\"#777\" stroke-dasharray=\"4 3\"/>\n");
    add_marks(sb, &x, &y, c->predicted, c->predicted_count, "r=\"2\" fill=\"#777\"");
    add_marks(sb, &x, &y, c->tried, c->tried_count,
              "r=\"5\" fill=\"none\" stroke=\"#1f77b4\" stroke-width=\"1.5\"");
    add_marks(sb, &x, &y, &c->own, c->own_count, "r=\"5\" fill=\"#d62728\"");
}

/* ------------------------------------------------------------------ the picture */

static int draw(const struct bar *bar, size_t count, const struct curves *curves, const char *title,
                const char *path, struct err *err)
{
    double first = 60, second = first + HEIGHT + GAP, third = second + HEIGHT + 2 * GAP;
    struct strbuf sb;
    char *text;
    size_t len;
    int rc;

    strbuf_init(&sb, 1 << 22);
    strbuf_addf(&sb,
                "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 960 %g\" "
                "font-family=\"sans-serif\" font-size=\"12\">\n"
                "<rect width=\"960\" height=\"%g\" fill=\"white\"/>\n"
                "<text x=\"%d\" y=\"24\" font-size=\"14\">%s</text>\n",
                third + HEIGHT + GAP, third + HEIGHT + GAP, LEFT, title);
    chart(&sb, bar, count, true, first);
    chart(&sb, bar, count, false, second);
    legend(&sb, second + HEIGHT + 20);
    kl_chart(&sb, curves, third);
    strbuf_addf(&sb, "</svg>\n");
    text = strbuf_detach(&sb, &len);
    if (text == NULL)
        return err_set(err, ERR_NO_MEMORY, "no memory for a picture of %zu matrices", count);
    rc = file_write_durable(path, text, len, err);
    free(text);
    return rc;
}

/* Of a matrix one part, that which all have in a file or the only one: the others may differ in
 * type from matrix to matrix, and lie in the file by that. */
static bool stands_for_matrix(const char *name)
{
    static const char *const others[] = {".sign", ".down", ".up"};
    const char *part = strrchr(name, '.');

    if (part == NULL || kind_of(name) == KINDS) /* norms */
        return false;
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++)
        if (strcmp(part, others[i]) == 0)
            return false;
    return true;
}

/* The matrices in the order of the model: tensors lie in that of the file. */
static size_t read_bars(const json_t *delta, struct bar *bar)
{
    const json_t *matrices = json_object_get(json_object_get(delta, "report"), "matrices");
    const json_t *bytes = json_object_get(matrices, "bytes");
    const json_t *errors = json_object_get(matrices, "relative_error");
    const json_t *tensors = json_object_get(delta, "tensors");
    size_t count = 0;

    for (size_t i = 0; i < json_array_size(tensors) && count < json_array_size(bytes); i++) {
        const char *name = json_string_value(json_object_get(json_array_get(tensors, i), "name"));

        if (name == NULL || !stands_for_matrix(name))
            continue;
        bar[count] = (struct bar){.kind = kind_of(name),
                                  .bytes = json_number_value(json_array_get(bytes, count)),
                                  .error = json_number_value(json_array_get(errors, count))};
        count++;
    }
    return count;
}

int delta_plot(const char *json, const char *path, struct err *err)
{
    json_t *delta = json_loads(json, 0, NULL);
    const char *codec = json_string_value(json_object_get(delta, "codec"));
    size_t room = json_array_size(json_object_get(delta, "tensors")), count;
    struct bar *bar = calloc(room + 1, sizeof *bar);
    struct curves curves;
    char title[96];
    int rc;

    count = bar != NULL ? read_bars(delta, bar) : 0;
    read_curves(json_object_get(delta, "report"), &curves);
    snprintf(title, sizeof title, "A delta by %s: %zu matrices",
             codec != NULL && strpbrk(codec, "<&>") == NULL ? codec : "an unknown codec", count);
    if (bar == NULL)
        rc = err_set(err, ERR_NO_MEMORY, "no memory for a picture");
    else if (count == 0)
        rc = err_set(err, ERR_INVALID,
                     "the delta carries no report of its matrices: it has nothing to plot");
    else
        rc = draw(bar, count, &curves, title, path, err);
    free(bar);
    json_decref(delta);
    return rc;
}
