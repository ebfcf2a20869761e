#include <stdio.h>

int main(void)
{
    fputs("graft: nothing here yet\n", stderr);
    return 2;
}
