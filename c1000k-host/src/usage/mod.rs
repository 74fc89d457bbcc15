//! What this process, its sockets and the kernel on its behalf use, cheap enough for each second.

mod counters;
mod kernel;
mod process;
mod processors;
mod slab;
mod sockets;

pub use {
    counters::NetCounters,
    kernel::{KernelCost, KernelMeter},
    process::{ProcessUsage, rss_of_rollup, rss_of_status},
    processors::{cpu_point, processors},
    slab::{SlabCache, SlabReader, SlabUsage},
    sockets::SocketUsage,
};
