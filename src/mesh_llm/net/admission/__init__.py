"""Who may join: invites, certificates, revocations, approvals."""
