// Streams and events of the stand-in runtime. A stream is a thread that does what it was asked for, in order and
// some time later, as a GPU does. Owns ordering only: what the work is, cudart.cpp knows.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace standin {

class Stream {
  public:
    const int device, priority;

    Stream(int device_, int priority_) : device(device_), priority(priority_) {
        // Streams live as long as the process: torch keeps its pools, and late work may still name one.
        std::thread([this] { run(); }).detach();
    }

    void order(std::function<void()> work) {
        std::lock_guard<std::mutex> guard(mutex_);
        work_.push_back(std::move(work));
        ++ordered_;
        changed_.notify_all();
    }

    // Block the caller until everything that was ordered so far is done.
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        const uint64_t target = ordered_;
        changed_.wait(lock, [&] { return done_ >= target; });
    }

    bool idle() {
        std::lock_guard<std::mutex> guard(mutex_);
        return done_ == ordered_;
    }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::function<void()>> work_;
    uint64_t ordered_ = 0, done_ = 0;

    void run() {
        for (;;) {
            std::function<void()> next;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                changed_.wait(lock, [&] { return !work_.empty(); });
                next = std::move(work_.front());
                work_.pop_front();
            }
            next();
            std::lock_guard<std::mutex> guard(mutex_);
            ++done_;
            changed_.notify_all();
        }
    }
};

// All streams, the default stream of each device among them.
class Streams {
  public:
    Stream* make(int device, int priority) {
        std::lock_guard<std::mutex> guard(mutex_);
        all_.push_back(new Stream(device, priority));
        return all_.back();
    }

    // 0, 1 and 2 stand for the default stream of the current device (driver_types.h: cudaStreamLegacy,
    // cudaStreamPerThread); every other handle is the address that `make` returned.
    Stream* find(const void* handle, int current) {
        if (reinterpret_cast<uintptr_t>(handle) > 2) {
            return static_cast<Stream*>(const_cast<void*>(handle));
        }
        {
            std::lock_guard<std::mutex> guard(mutex_);
            auto found = defaults_.find(current);
            if (found != defaults_.end()) return found->second;
        }
        Stream* made = make(current, 0);
        std::lock_guard<std::mutex> guard(mutex_);
        return defaults_.emplace(current, made).first->second;
    }

    void wait_for_all() {
        std::vector<Stream*> streams;
        {
            std::lock_guard<std::mutex> guard(mutex_);
            streams = all_;
        }
        for (Stream* stream : streams) stream->wait();
    }

  private:
    std::mutex mutex_;
    std::vector<Stream*> all_;
    std::map<int, Stream*> defaults_;
};

// An event can be recorded again while earlier recordings are still on their way, so recordings are numbered.
// Work on streams shares the state: an event may be destroyed before its recording is reached.
class Event {
  public:
    const int device;

    explicit Event(int device_) : device(device_), state_(std::make_shared<State>()) {}

    void record(Stream* stream) {
        auto state = state_;
        uint64_t number;
        {
            std::lock_guard<std::mutex> guard(state->mutex);
            number = ++state->recorded;
        }
        stream->order([state, number] {
            std::lock_guard<std::mutex> guard(state->mutex);
            if (state->passed < number) state->passed = number;
            state->changed.notify_all();
        });
    }

    bool passed() {
        std::lock_guard<std::mutex> guard(state_->mutex);
        return state_->passed >= state_->recorded;
    }

    void wait() { state_->wait_for(latest()); }

    // What comes on `stream` from now on waits for the latest recording.
    void hold_up(Stream* stream) {
        auto state = state_;
        const uint64_t number = latest();
        stream->order([state, number] { state->wait_for(number); });
    }

  private:
    struct State {
        std::mutex mutex;
        std::condition_variable changed;
        uint64_t recorded = 0, passed = 0;

        void wait_for(uint64_t number) {
            std::unique_lock<std::mutex> lock(mutex);
            changed.wait(lock, [&] { return passed >= number; });
        }
    };
    std::shared_ptr<State> state_;

    uint64_t latest() {
        std::lock_guard<std::mutex> guard(state_->mutex);
        return state_->recorded;
    }
};

}  // namespace standin
