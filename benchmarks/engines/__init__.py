"""The engines that are compared, qengine and its peers, behind one small interface; each in processes of its own."""
