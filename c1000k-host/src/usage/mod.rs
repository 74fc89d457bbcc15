//! The resources of this process, its sockets and the kernel on its behalf, cheap enough to read every second.

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
    processors::{MachineTime, processors},
    slab::{SlabCache, SlabReader, SlabUsage},
    sockets::SocketUsage,
};
