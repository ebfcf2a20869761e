/* When an answer counts as known. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "engine/recall.h"

static void expect(const char *answer, const char *expected, bool exact, bool contained)
{
    struct recall_match match = recall_compare(answer, strlen(answer), expected, strlen(expected));

    assert_int_equal(match.exact, exact);
    assert_int_equal(match.contained, contained);
}

static void case_blanks_and_a_final_dot_do_not_count(void **state)
{
    expect("Paris", "paris.", true, true);
    expect("  PARIS . \n", "Paris", true, true);
    expect("Paris", "Paris", true, true);
    expect("a.b", "A.B.", true, true);
}

static void other_answers_are_other_answers(void **state)
{
    expect("Paris, France", "Paris", false, true);
    expect("It is paris.", "Paris.", false, true);
    expect("Pari", "Paris", false, false);
    expect("", "Paris", false, false);
    expect("Par is", "Paris", false, false);
    expect("Paris..", "Paris", false, true);
    expect("Paris", ".", false, false); /* an answer of nothing is in no other one */
    expect(" ", ".", true, true);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(case_blanks_and_a_final_dot_do_not_count),
        cmocka_unit_test(other_answers_are_other_answers),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
