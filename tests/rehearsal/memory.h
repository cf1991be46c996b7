// Memory of the stand-in runtime: all of it is host memory, but it is known which blocks are a device's and which
// are page-locked, so that a copy that a GPU would refuse is refused here too.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace standin {

enum class Kind { PAGEABLE, PAGE_LOCKED, DEVICE };

struct Block {
    size_t nbytes;
    int device;
    Kind kind;
};

class Memory {
  public:
    static constexpr unsigned char JUNK = 0xA5;  // what a GPU leaves in new memory is anybody's guess

    // nullptr where there is no room on the device.
    void* take(size_t nbytes, Kind kind, int device, size_t capacity) {
        std::lock_guard<std::mutex> guard(mutex_);
        if (kind == Kind::DEVICE && used_[device] + nbytes > capacity) return nullptr;
        void* address = nullptr;
        // cudaMalloc promises 256 bytes at least; page-locked memory consists of whole pages.
        if (posix_memalign(&address, kind == Kind::DEVICE ? 512 : 4096, nbytes ? nbytes : 1)) return nullptr;
        memset(address, JUNK, nbytes);
        blocks_[reinterpret_cast<uintptr_t>(address)] = {nbytes, device, kind};
        if (kind == Kind::DEVICE) used_[device] += nbytes;
        return address;
    }

    // False where no block begins at this address.
    bool give(void* address) {
        std::lock_guard<std::mutex> guard(mutex_);
        auto found = blocks_.find(reinterpret_cast<uintptr_t>(address));
        if (found == blocks_.end()) return false;
        if (found->second.kind == Kind::DEVICE) used_[found->second.device] -= found->second.nbytes;
        // Whoever still reads or writes here meets junk, or the system's allocator complains.
        memset(address, JUNK, found->second.nbytes);
        blocks_.erase(found);
        free(address);
        return true;
    }

    // The block that holds [address, address + nbytes); memory that is not ours is pageable.
    Block find(const void* address, size_t nbytes = 1) {
        std::lock_guard<std::mutex> guard(mutex_);
        const auto place = reinterpret_cast<uintptr_t>(address);
        auto next = blocks_.upper_bound(place);
        if (next != blocks_.begin()) {
            --next;
            if (place + nbytes <= next->first + next->second.nbytes) return next->second;
        }
        return {0, -2, Kind::PAGEABLE};  // -2: as cudaPointerGetAttributes says
    }

    size_t used(int device) {
        std::lock_guard<std::mutex> guard(mutex_);
        return used_[device];
    }

  private:
    std::mutex mutex_;
    std::map<uintptr_t, Block> blocks_;
    std::map<int, size_t> used_;
};

}  // namespace standin
