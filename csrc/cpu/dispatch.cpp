#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(FASTRNN_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastrnn {

namespace portable {
KernelTable make_table();
}
#if defined(FASTRNN_HAVE_AVX2)
namespace avx2 {
KernelTable make_table();
}
#endif
#if defined(FASTRNN_HAVE_AVX512)
namespace avx512 {
KernelTable make_table();
}
#endif
#if defined(FASTRNN_HAVE_AVX512_BF16)
namespace avx512_bf16 {
KernelTable make_table();
}
#endif
#if defined(FASTRNN_HAVE_AMX)
namespace amx {
KernelTable make_table();
}
#endif

namespace {

#if defined(FASTRNN_X86)
struct Cpuid {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Cpuid(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &a, &b, &c, &d); }
};

bool bit(unsigned word, int i) { return word >> i & 1; }

// Registers whose state the operating system saves; without it the instructions fault.
uint64_t saved_state() {
  if (!bit(Cpuid(1, 0).c, 27)) return 0;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

bool has_avx2() {
  constexpr uint64_t ymm = 0x6;
  const Cpuid one(1, 0), seven(7, 0);
  return (saved_state() & ymm) == ymm && bit(one.c, 12) && bit(one.c, 29) && bit(seven.b, 5);
}

bool has_avx512() {
  constexpr uint64_t zmm = 0xe6;
  const Cpuid seven(7, 0);
  return (saved_state() & zmm) == zmm && has_avx2() && bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) &&
         bit(seven.b, 31);
}

bool has_avx512_bf16() { return has_avx512() && bit(Cpuid(7, 1).a, 5); }

// Linux grants the tile registers only on request, once a process.
bool has_amx() {
  constexpr uint64_t tiles = 0x60000;
  const Cpuid seven(7, 0);
  if (!has_avx512_bf16() || (saved_state() & tiles) != tiles || !bit(seven.d, 22) || !bit(seven.d, 24)) return false;
#if defined(__linux__)
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

std::vector<KernelTable> make_tables() {
  std::vector<KernelTable> tables;
#if defined(FASTRNN_HAVE_AMX)
  if (has_amx()) tables.push_back(amx::make_table());
#endif
#if defined(FASTRNN_HAVE_AVX512_BF16)
  if (has_avx512_bf16()) tables.push_back(avx512_bf16::make_table());
#endif
#if defined(FASTRNN_HAVE_AVX512)
  if (has_avx512()) tables.push_back(avx512::make_table());
#endif
#if defined(FASTRNN_HAVE_AVX2)
  if (has_avx2()) tables.push_back(avx2::make_table());
#endif
  tables.push_back(portable::make_table());
  return tables;
}

const std::vector<KernelTable>& tables() {
  static const std::vector<KernelTable> all = make_tables();
  return all;
}

const KernelTable& find(const std::string& name) {
  std::string names;
  for (const KernelTable& table : tables()) {
    if (table.isa == name) return table;
    names += names.empty() ? table.isa : std::string(", ") + table.isa;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not supported here; these are: " + names);
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table{nullptr};
  return table;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const KernelTable& table : tables()) names.emplace_back(table.isa);
  return names;
}

const KernelTable& kernels() {
  if (const KernelTable* table = current().load(std::memory_order_acquire)) return *table;
  const char* const wanted = std::getenv("FASTRNN_ISA");
  const KernelTable& table = wanted && *wanted ? find(wanted) : tables().front();
  current().store(&table, std::memory_order_release);
  return table;
}

void use_isa(const std::string& name) { current().store(&find(name), std::memory_order_release); }

}  // namespace fastrnn
