//! Copies of the kernel's figures, and the description of a machine.

use std::fs;
use std::path::Path;
use std::thread;

use anyhow::{Context, Result};
use nix::unistd::Pid;
use procfs::{Current, Meminfo};

/// Files of `/proc`, and the names of their copies.
const KERNEL: [(&str, &str); 7] = [
    ("slabinfo", "slabinfo"),
    ("thread-self/net/sockstat", "sockstat"),
    ("thread-self/net/netstat", "netstat"),
    ("thread-self/net/snmp", "snmp"),
    ("thread-self/net/dev", "netdev"),
    ("thread-self/net/softnet_stat", "softnet_stat"),
    ("meminfo", "meminfo"),
];

const SERVER: [&str; 2] = ["smaps_rollup", "status"];

/// Copies the files of the calling thread's network namespace and of the server's process. Unreadable ones are left out:
/// `slabinfo` needs root.
pub(crate) fn take(folder: &Path, server: Option<Pid>) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let mut files = KERNEL.map(|(from, to)| (from.to_owned(), to.to_owned())).to_vec();
    if let Some(pid) = server {
        files.extend(SERVER.map(|name| (format!("{pid}/{name}"), format!("server-{name}"))));
    }
    for (from, to) in files {
        if let Ok(text) = fs::read(Path::new("/proc").join(from)) {
            fs::write(folder.join(to), text)?;
        }
    }
    Ok(())
}

/// The lines of `machine.txt` that describe this machine.
pub(crate) fn describe_machine() -> Result<String> {
    let (release, cpus) = (kernel_release()?, thread::available_parallelism()?);
    let memory_kb = Meminfo::current()?.mem_total >> 10;
    Ok(format!("kernel: Linux {release}\ncpus: {cpus}\nmemory_kb: {memory_kb}\n"))
}

pub(crate) fn kernel_release() -> Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned())
}
