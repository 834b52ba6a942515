/* Stands in for pyxis: takes its options and writes what it was given, a line each, to $REMIT_SPANK_RECORD. Nothing is put into a
   container. Compiled by tests/cluster/test_container.py against Slurm's own header. */
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>

SPANK_PLUGIN(remit_container, 1);

static const char *names[] = {"container-image", "container-workdir", "container-mounts"};

static int taken(int val, const char *optarg, int remote)
{
	const char *path = getenv("REMIT_SPANK_RECORD");
	FILE *file;

	if (remote || path == NULL || (file = fopen(path, "a")) == NULL)
		return 0;
	fprintf(file, "--%s=%s\n", names[val], optarg);
	fclose(file);
	return 0;
}

int slurm_spank_init(spank_t sp, int ac, char **av)
{
	int i;

	for (i = 0; i < 3; i++) {
		struct spank_option option = {(char *)names[i], "VALUE", "as pyxis has it", 1, i, taken};
		if (spank_option_register(sp, &option) != ESPANK_SUCCESS)
			return -1;
	}
	return 0;
}
