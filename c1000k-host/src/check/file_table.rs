//! Where the kernel keeps the files of connections' sockets, and which limits that needs.

use {
    super::{Machine, requirements::Requirements},
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

/// The choice on the command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum FileTableChoice {
    /// Registered files if the connections do not fit under the descriptor limit
    #[default]
    Auto,
    /// A descriptor for each connection
    Process,
    /// io_uring's registered files, which the descriptor limit does not count
    Registered,
}

impl FileTableChoice {
    /// Its name on the command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Process => "process",
            Self::Registered => "registered",
        }
    }
}

/// The table that holds connections' sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileTable {
    /// The process's descriptor table.
    #[default]
    Process,
    /// Registered-file tables of io_uring.
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

impl Requirements {
    /// The same as [`in_file_table`](Self::in_file_table), and logs the result.
    ///
    /// # Errors
    /// One line, if registered files were requested and are not available.
    pub fn with_file_table(
        self,
        choice: FileTableChoice,
        machine: &Machine,
    ) -> Result<Self, String> {
        let (requirements, reason) = self.in_file_table(choice, machine)?;
        match reason {
            Some(reason) => log::warn!("{reason}"),
            None if requirements.file_table == FileTable::Process => {}
            None => log::info!("connections are held in {}", requirements.file_table),
        }
        Ok(requirements)
    }

    /// The same with its sockets in the requested table; if registered files are not used although descriptors are too
    /// few, also one line with the reason.
    ///
    /// # Errors
    /// One line, if registered files were requested and are not available.
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

/// Locked memory of one table's ring: at least two pages of 4 KiB, at most seven.
const RING_BYTES_MAX: u64 = 7 * 4096;

/// The limit of all rings together; if there are many, each is smaller, down to two pages.
const RINGS_BYTES: u64 = 2 << 20;
const RING_BYTES_MIN: u64 = 2 * 4096;

impl FileTableChoice {
    /// The table to use: with `Auto`, registered files if the descriptors of this machine are too few for the target
    /// and `registered` says that they are available; if they are not, also one line with the reason.
    ///
    /// # Errors
    /// One line, if registered files were requested and are not available.
    fn resolve(
        self,
        machine: &Machine,
        requirements: &Requirements,
        registered: impl FnOnce() -> Result<(), String>,
    ) -> Result<(FileTable, Option<String>), String> {
        let listening = requirements.listening_ports();
        let within = machine.connections_within(listening).unwrap_or(u64::MAX);
        match self {
            Self::Process => Ok((FileTable::Process, None)),
            Self::Auto if requirements.connections <= within => Ok((FileTable::Process, None)),
            Self::Auto => {
                let refusal = registered().and_then(|()| Self::too_few_places(machine, requirements, within));
                Ok(match refusal {
                    Ok(()) => (FileTable::Registered, None),
                    Err(reason) => (
                        FileTable::Process,
                        Some(format!(
                            "registered files are not available: each connection takes a descriptor ({reason})"
                        )),
                    ),
                })
            }
            Self::Registered => registered().map(|()| (FileTable::Registered, None)).map_err(|reason| {
                format!("--file-table registered is not available: {reason}; leave it out, or use process")
            }),
        }
    }

    /// With very few descriptors or little locked memory, descriptors hold more connections than the tables can.
    fn too_few_places(
        machine: &Machine,
        requirements: &Requirements,
        within: u64,
    ) -> Result<(), String> {
        match machine.places_max(requirements) {
            Some(places) if places <= within => Err(format!(
                "RLIMIT_NOFILE and RLIMIT_MEMLOCK (ulimit -n, -l) leave them {}",
                format::counted(places, "place")
            )),
            _ => Ok(()),
        }
    }
}

impl Machine {
    /// The number of tables for the connections. Each takes a descriptor and has as many places as the process may have
    /// descriptors.
    pub(super) fn tables_for(&self, connections: u64) -> u64 {
        let places = self.descriptors_max().unwrap_or(u64::MAX).clamp(1, 1 << 20);
        // One is made in advance.
        connections.div_ceil(places).saturating_add(1)
    }

    /// Descriptors that the target needs besides the listeners, in either table.
    pub(super) fn descriptors_needed(&self, requirements: &Requirements) -> u64 {
        match requirements.file_table {
            FileTable::Process => requirements.connections,
            FileTable::Registered => {
                self.tables_for(requirements.connections).saturating_add(UNDER_WAY)
            }
        }
    }

    /// Memory that the rings lock.
    pub(super) fn locked_bytes_needed(&self, requirements: &Requirements) -> u64 {
        let tables = self.tables_for(requirements.connections);
        tables
            .saturating_mul(RING_BYTES_MAX)
            .min(RINGS_BYTES)
            .max(tables.saturating_mul(RING_BYTES_MIN))
    }

    /// The maximum number of connections whose tables fit under the limits of descriptors and of locked memory.
    pub(super) fn places_max(&self, requirements: &Requirements) -> Option<u64> {
        let tables = self
            .tables_within_descriptors(requirements)?
            .min(self.tables_within_locked_memory(requirements));
        let places = self.descriptors_max()?.min(1 << 20);
        Some(tables.saturating_mul(places))
    }

    /// The number of tables, without the one made in advance, for whose rings there are descriptors.
    fn tables_within_descriptors(&self, requirements: &Requirements) -> Option<u64> {
        Some(self.connections_within(requirements.listening_ports())?.saturating_sub(UNDER_WAY + 1))
    }

    /// The same, for whose rings the memory may be locked: if both ends are here, each has half of the user's limit.
    fn tables_within_locked_memory(&self, requirements: &Requirements) -> u64 {
        self.locked_bytes_max.map_or(u64::MAX, |most| {
            (most / requirements.sockets_per_connection() / RING_BYTES_MIN).saturating_sub(1)
        })
    }

    /// A description of the limit that binds the number of tables.
    pub(super) fn tables_bound(&self, requirements: &Requirements) -> Option<String> {
        let within_locked_memory = self.tables_within_locked_memory(requirements);
        Some(match self.locked_bytes_max {
            Some(most)
                if within_locked_memory < self.tables_within_descriptors(requirements)? =>
            {
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
        choice.resolve(&machine, &Requirements::new(Role::Server, connections), registered)
    }

    #[test]
    fn auto_takes_registered_files_where_descriptors_are_too_few() {
        let auto = |connections| resolve(FileTableChoice::Auto, connections, Ok(()));
        assert_eq!(auto(10_000), Ok((FileTable::Process, None)));
        assert_eq!(auto(1_000_000), Ok((FileTable::Registered, None)));
    }

    #[test]
    fn where_registered_files_are_refused_auto_says_why_and_a_request_for_them_fails() {
        let (table, reason) =
            resolve(FileTableChoice::Auto, 1_000_000, Err("no io_uring")).unwrap();
        assert_eq!(table, FileTable::Process);
        assert!(reason.unwrap().ends_with("takes a descriptor (no io_uring)"));
        let line = resolve(FileTableChoice::Registered, 1, Err("no io_uring")).unwrap_err();
        assert!(line.contains("no io_uring; leave it out, or use process"), "{line}");
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
