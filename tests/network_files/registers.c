/* Lets user-mode-linux of Debian 12 run on processors with AMX: to be preloaded.

   It keeps 2,696 bytes of a process's registers, as many as AVX-512 needs. Where the processor has more (AMX) the host's kernel
   takes them all or none, and user-mode-linux dies with its first process. The rest is what the process has at this moment. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

#define NT_X86_XSTATE 0x202

long ptrace(enum __ptrace_request request, ...)
{
  static long (*real)(enum __ptrace_request, pid_t, void *, void *);
  static unsigned char whole[1 << 16];
  va_list arguments;
  pid_t process;
  void *address, *data;

  if (!real)
    real = (long (*)(enum __ptrace_request, pid_t, void *, void *))dlsym(RTLD_NEXT, "ptrace");
  va_start(arguments, request);
  process = va_arg(arguments, pid_t);
  address = va_arg(arguments, void *);
  data = va_arg(arguments, void *);
  va_end(arguments);

  if (request == PTRACE_SETREGSET && (uintptr_t)address == NT_X86_XSTATE) {
    struct iovec *given = data, all = {whole, sizeof whole};
    if (!real(PTRACE_GETREGSET, process, address, &all) && all.iov_len > given->iov_len) {
      memcpy(whole, given->iov_base, given->iov_len);
      return real(request, process, address, &all);
    }
  }
  return real(request, process, address, data);
}
