//! Who hears what happens to jobs. Events are delivered in the order in which they happened, on the thread that caused them.

use std::fmt;

use super::types::JobEvent;
use crate::sync::Mutex;

type Listener = Box<dyn Fn(&JobEvent) + Send + Sync>;

/// The listeners of one mount. A listener must not block and must not call back.
#[derive(Default)]
pub struct EventHub {
    listeners: Mutex<(u64, Vec<(u64, Listener)>)>,
}

impl EventHub {
    /// Adds a listener; the number removes it.
    pub fn subscribe(&self, listener: Listener) -> u64 {
        let mut listeners = self.listeners.lock();
        listeners.0 += 1;
        let id = listeners.0;
        listeners.1.push((id, listener));
        id
    }

    /// Removes a listener.
    pub fn unsubscribe(&self, id: u64) {
        self.listeners.lock().1.retain(|(listener, _)| *listener != id);
    }

    /// Tells everybody.
    pub fn emit(&self, event: &JobEvent) {
        log::debug!("{event:?}");
        for (_, listener) in &self.listeners.lock().1 {
            listener(event);
        }
    }
}

impl fmt::Debug for EventHub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventHub").finish_non_exhaustive()
    }
}
