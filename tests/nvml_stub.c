/* Stands in for libnvidia-ml.so.1: the GPUs are those that a text file describes (tests/nvml.py writes it).

   The file named by NVML_STUB is read at every nvmlInitWithFlags:
       init <return code>
       gpu   key=value ...     one for each GPU, in the order of NVML
       slice key=value ...     a MIG slice of the GPU before it
   Structures and return codes are those of nvml.h. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, NO_FUNCTION = 13 };

typedef struct {
    char uuid[96], name[96];
    unsigned bus, gi, ci;
    unsigned long long total, used, reserved;
    int utilisation;        /* negative: not supported */
    int mode, divided, old; /* old: a driver before 510 */
    int handle_error, pci_error, uuid_error, error;
    int process_error, processes;
    unsigned pids[64];
    int gpu; /* of a slice: the index of its GPU; else -1 */
} Device;

typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } Process;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } Pci;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } MemoryV2;

static Device devices[64];
static int count, open_handles;

static void set(Device *d, const char *key, char *value) {
    long long number = atoll(value);
    if (!strcmp(key, "uuid")) snprintf(d->uuid, sizeof d->uuid, "%s", value);
    else if (!strcmp(key, "name")) snprintf(d->name, sizeof d->name, "%s", value);
    else if (!strcmp(key, "bus")) d->bus = number;
    else if (!strcmp(key, "gi")) d->gi = number;
    else if (!strcmp(key, "ci")) d->ci = number;
    else if (!strcmp(key, "total")) d->total = number;
    else if (!strcmp(key, "used")) d->used = number;
    else if (!strcmp(key, "reserved")) d->reserved = number;
    else if (!strcmp(key, "utilisation")) d->utilisation = number;
    else if (!strcmp(key, "mode")) d->mode = number;
    else if (!strcmp(key, "divided")) d->divided = number;
    else if (!strcmp(key, "old")) d->old = number;
    else if (!strcmp(key, "handle_error")) d->handle_error = number;
    else if (!strcmp(key, "pci_error")) d->pci_error = number;
    else if (!strcmp(key, "uuid_error")) d->uuid_error = number;
    else if (!strcmp(key, "error")) d->error = number;
    else if (!strcmp(key, "process_error")) d->process_error = number;
    else if (!strcmp(key, "pid")) d->pids[d->processes++] = number;
    else { fprintf(stderr, "nvml_stub: unknown key %s\n", key); abort(); }
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    const char *path = getenv("NVML_STUB");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) { fprintf(stderr, "nvml_stub: NVML_STUB names no file\n"); abort(); }
    char line[4096];
    int result = SUCCESS, gpu = -1;
    count = 0;
    memset(devices, 0, sizeof devices);
    while (fgets(line, sizeof line, file)) {
        char *word = strtok(line, " \n");
        if (!word) continue;
        if (!strcmp(word, "init")) { result = atoi(strtok(NULL, " \n")); continue; }
        Device *d = &devices[count];
        if (!strcmp(word, "gpu")) { gpu = count; d->gpu = -1; } else d->gpu = gpu;
        count++;
        while ((word = strtok(NULL, " \n"))) {
            char *value = strchr(word, '=');
            *value++ = 0;
            set(d, word, value);
        }
    }
    fclose(file);
    if (result == SUCCESS) open_handles++;
    return result;
}

int nvmlShutdown(void) {
    if (!open_handles) return UNINITIALIZED;
    open_handles--;
    return SUCCESS;
}

/* Of the stub alone: how often NVML is initialised now. */
int stub_open(void) { return open_handles; }

const char *nvmlErrorString(int code) {
    static char text[32];
    snprintf(text, sizeof text, "error %d", code);
    return text;
}

static Device *child(int gpu, unsigned index) {
    for (int i = 0; i < count; i++)
        if (devices[i].gpu == gpu && !index--) return &devices[i];
    return NULL;
}

int nvmlDeviceGetCount_v2(unsigned *n) {
    *n = 0;
    while (child(-1, *n)) ++*n;
    return open_handles ? SUCCESS : UNINITIALIZED;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **d) {
    *d = child(-1, index);
    return *d ? (*d)->handle_error : NOT_FOUND;
}

int nvmlDeviceGetUUID(Device *d, char *text, unsigned length) {
    snprintf(text, length, "%s", d->uuid);
    return d->uuid_error;
}

int nvmlDeviceGetName(Device *d, char *text, unsigned length) {
    snprintf(text, length, "%s", d->name);
    return d->error;
}

int nvmlDeviceGetPciInfo_v3(Device *d, Pci *pci) {
    memset(pci, 0, sizeof *pci);
    pci->bus = d->bus;
    return d->pci_error;
}

int nvmlDeviceGetMemoryInfo(Device *d, Memory *m) {
    m->total = d->total;
    m->used = d->used + d->reserved;
    m->free = m->total - m->used;
    return d->error;
}

int nvmlDeviceGetMemoryInfo_v2(Device *d, MemoryV2 *m) {
    if (d->old) return NO_FUNCTION;
    m->total = d->total;
    m->used = d->used;
    m->reserved = d->reserved;
    m->free = d->total - d->used - d->reserved;
    return d->error;
}

int nvmlDeviceGetUtilizationRates(Device *d, unsigned *rates) {
    if (d->gpu >= 0 || d->utilisation < 0) return NOT_SUPPORTED;
    rates[0] = d->utilisation;
    rates[1] = 0;
    return d->error;
}

int nvmlDeviceGetComputeMode(Device *d, int *mode) { *mode = d->mode; return d->error; }

int nvmlDeviceGetComputeRunningProcesses_v2(Device *d, unsigned *n, Process *found) {
    if (d->process_error || d->error) return d->process_error ? d->process_error : d->error;
    int enough = (int)*n >= d->processes;
    for (int i = 0; enough && i < d->processes; i++) found[i] = (Process){d->pids[i], 1 << 20, 0, 0};
    *n = d->processes;
    return enough ? SUCCESS : INSUFFICIENT_SIZE;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *d, unsigned *n, Process *found) {
    return d->old ? NO_FUNCTION : nvmlDeviceGetComputeRunningProcesses_v2(d, n, found);
}

int nvmlDeviceGetMigMode(Device *d, unsigned *now, unsigned *pending) {
    *now = *pending = d->divided;
    return d->old ? NOT_SUPPORTED : d->error;
}

int nvmlDeviceGetMaxMigDeviceCount(Device *d, unsigned *n) { *n = 7; return d->error; }

int nvmlDeviceGetMigDeviceHandleByIndex(Device *d, unsigned index, Device **slice) {
    *slice = child(d - devices, index);
    return *slice ? (*slice)->handle_error : NOT_FOUND;
}

int nvmlDeviceGetGpuInstanceId(Device *d, unsigned *id) { *id = d->gi; return d->error; }

int nvmlDeviceGetComputeInstanceId(Device *d, unsigned *id) { *id = d->ci; return d->error; }
