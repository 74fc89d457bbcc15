//! The part of each target, of runs with several.

use c1000k_host::format;

use crate::run::Run;
use crate::table::columns;

/// The maximum shown for each client.
const TARGETS_MAX: usize = 100;

/// The part of each target of the clients that have several; empty if none has.
pub(crate) fn section(runs: &[Run]) -> String {
    let clients = runs.iter().flat_map(|run| run.clients.iter().map(move |client| (run, client)));
    let several = clients.filter(|(_, (_, client))| client.targets.len() > 1);
    let rows: Vec<_> = several
        .flat_map(|(run, (name, client))| {
            let name = match runs {
                [_] => name.clone(),
                _ => run.folder.join(name).display().to_string(),
            };
            client.targets.iter().take(TARGETS_MAX).map(move |part| {
                let figures = [part.established, part.attempted, part.failed, part.lost];
                let [established, attempted, failed, lost] = figures.map(format::count);
                [name.clone(), part.target.clone(), established, attempted, failed, lost]
            })
        })
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    let heading = ["client", "target", "held", "attempted", "failed", "lost"];
    format!("## Targets\n\n{}", columns(heading, &rows, |column| column > 1))
}
