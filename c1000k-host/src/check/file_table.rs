//! Where the kernel keeps the files of connections' sockets, and what that asks of the limits.

use {
    super::{Machine, need::Need},
    crate::format,
    clap::{Args, ValueEnum},
    std::fmt,
};

/// The argument `--file-table`, the same for both programs.
#[derive(Args, Clone, Copy, Debug)]
pub struct FileTableArgs {
    /// Where sockets are held: descriptors, or io_uring's registered files, which `ulimit -n` does not count
    #[arg(
        id = "file_table",
        long = "file-table",
        value_enum,
        default_value = "auto",
        hide_possible_values = true,
        value_name = "auto|process|registered"
    )]
    pub choice: FileTableChoice,
}

/// What is asked for on the command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum FileTableChoice {
    /// Registered files where the connections do not fit under the limit of descriptors
    #[default]
    Auto,
    /// A descriptor for each connection
    Process,
    /// io_uring's registered files, which the limit of descriptors does not count
    Registered,
}

impl FileTableChoice {
    /// As the command line has it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Process => "process",
            Self::Registered => "registered",
        }
    }
}

/// Where connections' sockets are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileTable {
    /// The process's descriptor table.
    #[default]
    Process,
    /// Registered-file tables of io_uring's.
    Registered,
}

impl fmt::Display for FileTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Process => "descriptors",
            Self::Registered => "registered files",
        })
    }
}

impl From<FileTable> for reactor::FileTable {
    fn from(table: FileTable) -> Self {
        match table {
            FileTable::Process => Self::Process,
            FileTable::Registered => Self::Registered,
        }
    }
}

impl From<FileTable> for c1000k_record::FileTable {
    fn from(table: FileTable) -> Self {
        match table {
            FileTable::Process => Self::Process,
            FileTable::Registered => Self::Registered,
        }
    }
}

impl Need {
    /// As [`in_file_table`](Self::in_file_table), which the log tells of.
    ///
    /// # Errors
    /// One line, where registered files were asked for and can't be had.
    pub fn with_file_table(
        self,
        choice: FileTableChoice,
        machine: &Machine,
    ) -> Result<Self, String> {
        let (need, reason) = self.in_file_table(choice, machine)?;
        match reason {
            Some(reason) => log::warn!("{reason}"),
            None if need.file_table == FileTable::Process => {}
            None => log::info!("connections are held in {}", need.file_table),
        }
        Ok(need)
    }

    /// The same with its sockets in the table that was asked for; where registered files are not taken though
    /// descriptors are too few, also one line that says why.
    ///
    /// # Errors
    /// One line, where registered files were asked for and can't be had.
    pub fn in_file_table(
        self,
        choice: FileTableChoice,
        machine: &Machine,
    ) -> Result<(Self, Option<String>), String> {
        let registered =
            || reactor::FileTable::check_registered().map_err(|error| error.to_string());
        let (file_table, reason) = choice.resolve(machine, &self, registered)?;
        Ok((Self { file_table, ..self }, reason))
    }
}

/// Descriptors of connections that are being opened, before their files are registered.
const UNDER_WAY: u64 = 64;

/// Locked memory of one table's ring: two pages of 4 KiB at least, seven at most.
const RING_BYTES_MAX: u64 = 7 * 4096;

/// All rings together keep to this, in smaller rings where there are many, down to two pages each.
const RINGS_BYTES: u64 = 2 << 20;
const RING_BYTES_MIN: u64 = 2 * 4096;

impl FileTableChoice {
    /// What is taken: of `Auto`, registered files where the descriptors of this machine are too few for the target and
    /// `registered` says that they can be had; where they can't, also one line that says why descriptors are taken.
    ///
    /// # Errors
    /// One line, where registered files were asked for and can't be had.
    fn resolve(
        self,
        machine: &Machine,
        need: &Need,
        registered: impl FnOnce() -> Result<(), String>,
    ) -> Result<(FileTable, Option<String>), String> {
        let listening = need.listening_ports();
        let within = machine.connections_within(listening).unwrap_or(u64::MAX);
        match self {
            Self::Process => Ok((FileTable::Process, None)),
            Self::Auto if need.connections <= within => Ok((FileTable::Process, None)),
            Self::Auto => {
                let refusal = registered().and_then(|()| Self::too_few_places(machine, need, within));
                Ok(match refusal {
                    Ok(()) => (FileTable::Registered, None),
                    Err(reason) => (
                        FileTable::Process,
                        Some(format!(
                            "each connection takes a descriptor, as registered files can't be had: {reason}"
                        )),
                    ),
                })
            }
            Self::Registered => registered().map(|()| (FileTable::Registered, None)).map_err(|reason| {
                format!("--file-table registered can't be had: {reason}; leave it out, or give process")
            }),
        }
    }

    /// With hardly any descriptors or locked memory, descriptors hold more than the tables that can be had.
    fn too_few_places(machine: &Machine, need: &Need, within: u64) -> Result<(), String> {
        match machine.places_max(need) {
            Some(places) if places <= within => Err(format!(
                "RLIMIT_NOFILE and RLIMIT_MEMLOCK (ulimit -n, -l) leave them {}",
                format::counted(places, "place")
            )),
            _ => Ok(()),
        }
    }
}

impl Machine {
    /// The tables that this many connections need, each of which takes a descriptor and has as many places as the process
    /// may have descriptors.
    pub(super) fn tables_for(&self, connections: u64) -> u64 {
        let places = self.descriptors_max().unwrap_or(u64::MAX).clamp(1, 1 << 20);
        // One is made ahead.
        connections.div_ceil(places).saturating_add(1)
    }

    /// Descriptors that the target needs beside the listeners, in either table.
    pub(super) fn descriptors_needed(&self, need: &Need) -> u64 {
        match need.file_table {
            FileTable::Process => need.connections,
            FileTable::Registered => self.tables_for(need.connections).saturating_add(UNDER_WAY),
        }
    }

    /// Memory that the rings lock.
    pub(super) fn locked_bytes_needed(&self, need: &Need) -> u64 {
        let tables = self.tables_for(need.connections);
        tables
            .saturating_mul(RING_BYTES_MAX)
            .min(RINGS_BYTES)
            .max(tables.saturating_mul(RING_BYTES_MIN))
    }

    /// The most connections whose tables fit under the limits of descriptors and of locked memory.
    pub(super) fn places_max(&self, need: &Need) -> Option<u64> {
        let tables =
            self.tables_within_descriptors(need)?.min(self.tables_within_locked_memory(need));
        let places = self.descriptors_max()?.min(1 << 20);
        Some(tables.saturating_mul(places))
    }

    /// Tables, but the one that is made ahead, whose rings have a descriptor.
    fn tables_within_descriptors(&self, need: &Need) -> Option<u64> {
        Some(self.connections_within(need.listening_ports())?.saturating_sub(UNDER_WAY + 1))
    }

    /// The same, whose rings' memory may be locked: where both ends are here, each has half of what its user may lock.
    fn tables_within_locked_memory(&self, need: &Need) -> u64 {
        self.locked_bytes_max.map_or(u64::MAX, |most| {
            (most / need.sockets_per_connection() / RING_BYTES_MIN).saturating_sub(1)
        })
    }

    /// What binds the number of tables, in words.
    pub(super) fn tables_bound(&self, need: &Need) -> Option<String> {
        let within_locked_memory = self.tables_within_locked_memory(need);
        Some(match self.locked_bytes_max {
            Some(most) if within_locked_memory < self.tables_within_descriptors(need)? => {
                format!("RLIMIT_MEMLOCK is {} for all processes of this user", format::bytes(most))
            }
            _ => format!("RLIMIT_NOFILE is {} hard", format::count(self.descriptors_max()?)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{check::Role, limits::DescriptorLimit};

    const MACHINE_DESCRIPTORS: DescriptorLimit = DescriptorLimit { soft: 20_000, hard: 20_000 };

    fn resolve(
        choice: FileTableChoice,
        connections: u64,
        registered: Result<(), &str>,
    ) -> Result<(FileTable, Option<String>), String> {
        let machine = Machine { descriptors: Some(MACHINE_DESCRIPTORS), ..Machine::default() };
        let registered = || registered.map_err(str::to_owned);
        choice.resolve(&machine, &Need::new(Role::Server, connections), registered)
    }

    #[test]
    fn auto_takes_registered_files_where_descriptors_are_too_few() {
        let auto = |connections| resolve(FileTableChoice::Auto, connections, Ok(()));
        assert_eq!(auto(10_000), Ok((FileTable::Process, None)));
        assert_eq!(auto(1_000_000), Ok((FileTable::Registered, None)));
    }

    #[test]
    fn where_registered_files_are_refused_auto_says_why_and_the_demand_for_them_fails() {
        let (table, reason) =
            resolve(FileTableChoice::Auto, 1_000_000, Err("no io_uring")).unwrap();
        assert_eq!(table, FileTable::Process);
        assert!(reason.unwrap().ends_with("can't be had: no io_uring"));
        let line = resolve(FileTableChoice::Registered, 1, Err("no io_uring")).unwrap_err();
        assert!(line.contains("no io_uring; leave it out, or give process"), "{line}");
        let process = resolve(FileTableChoice::Process, 1_000_000, Err("no io_uring"));
        assert_eq!(process, Ok((FileTable::Process, None)));
    }

    #[test]
    fn the_record_has_the_name_of_the_command_line() {
        for (choice, table) in [
            (FileTableChoice::Process, FileTable::Process),
            (FileTableChoice::Registered, FileTable::Registered),
        ] {
            let value = choice.to_possible_value().unwrap();
            assert_eq!(value.get_name(), c1000k_record::FileTable::from(table).to_string());
        }
    }
}
