//! Copies of the kernel's own figures at one moment.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use nix::unistd::Pid;

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

/// Of the calling thread's network namespace. What can't be read here (slabinfo needs root) is left out.
pub(crate) fn take(folder: &Path, server: Option<Pid>) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let keep = |from: String, to: &str| match fs::read(Path::new("/proc").join(from)) {
        Ok(text) => fs::write(folder.join(to), text),
        Err(_) => Ok(()),
    };
    for (from, to) in KERNEL {
        keep(from.to_owned(), to)?;
    }
    for name in server.iter().flat_map(|_| SERVER) {
        let pid = server.map_or(0, Pid::as_raw);
        keep(format!("{pid}/{name}"), &format!("server-{name}"))?;
    }
    Ok(())
}
