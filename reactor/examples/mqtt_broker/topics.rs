//! Who has subscribed to what: a tree with one node for each level of each filter.

use std::collections::HashMap;
use std::str::Split;

use mqtt_proto::QoS;
use reactor::Token;

/// The tree is as deep as its filters, and walked to that depth.
const LEVELS_MAX: usize = 32;

#[derive(Default)]
pub(crate) struct Topics {
    children: HashMap<Box<str>, Topics>,
    subscribers: HashMap<Token, QoS>,
}

impl Topics {
    /// Whether the filter was taken.
    pub(crate) fn subscribe(&mut self, filter: &str, token: Token, qos: QoS) -> bool {
        if filter.split('/').count() > LEVELS_MAX {
            return false;
        }
        let mut node = self;
        for level in filter.split('/') {
            node = node.children.entry(level.into()).or_default();
        }
        node.subscribers.insert(token, qos);
        true
    }

    pub(crate) fn unsubscribe(&mut self, filter: &str, token: Token) {
        self.remove(filter.split('/'), token);
    }

    fn remove(&mut self, mut levels: Split<'_, char>, token: Token) {
        let Some(level) = levels.next() else {
            self.subscribers.remove(&token);
            return;
        };
        if let Some(child) = self.children.get_mut(level) {
            child.remove(levels, token);
            if child.children.is_empty() && child.subscribers.is_empty() {
                self.children.remove(level);
            }
        }
    }

    /// Each subscriber of a topic once, with the highest QoS of its filters.
    pub(crate) fn subscribers(&self, topic: &str) -> HashMap<Token, QoS> {
        let mut found = HashMap::new();
        // A wildcard at the beginning does not stand for topics that begin with a dollar.
        self.collect(topic.split('/'), topic.starts_with('$'), &mut found);
        found
    }

    fn collect(
        &self,
        mut levels: Split<'_, char>,
        only_by_name: bool,
        found: &mut HashMap<Token, QoS>,
    ) {
        let child = |name: &str| self.children.get(name);
        let wildcard = |name: &str| if only_by_name { None } else { child(name) };
        // It stands for the level above it too.
        if let Some(rest) = wildcard("#") {
            rest.add_own(found);
        }
        let Some(level) = levels.next() else { return self.add_own(found) };
        for next in [child(level), wildcard("+")].into_iter().flatten() {
            next.collect(levels.clone(), false, found);
        }
    }

    fn add_own(&self, found: &mut HashMap<Token, QoS>) {
        for (&token, &qos) in &self.subscribers {
            let highest = found.entry(token).or_insert(qos);
            *highest = qos.max(*highest);
        }
    }
}

/// Whether a filter stands for a topic.
pub(crate) fn matches(filter: &str, topic: &str) -> bool {
    let (mut filters, mut levels) = (filter.split('/'), topic.split('/'));
    if topic.starts_with('$') && filter.starts_with(['#', '+']) {
        return false;
    }
    loop {
        match (filters.next(), levels.next()) {
            (Some("#"), _) | (None, None) => return true,
            (Some("+"), Some(_)) => {}
            (Some(name), Some(level)) if name == level => {}
            _ => return false,
        }
    }
}
